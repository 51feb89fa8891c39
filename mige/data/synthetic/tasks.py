"""The world's tasks: a seed -> pictures, an instruction for them, and the one picture that answers it.

Text to image and subject-driven scenes, nine edits, three edits with a subject. What an instruction adds stands upright
in the middle of its place, so that the answer is exact; what is there already is scattered and turned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mige.data.synthetic import backgrounds, sprites
from mige.data.synthetic.scenes import COLOURS, SIDE, SWAPS, Placed, Scene, tint
from mige.tasks import PLACEHOLDER, Task

RASTER = (26, 64, 102)  # middles of the rows and columns of places, px
PLACES = (
    ("in the top left corner", "at the top left"),
    ("at the top", "in the middle of the top"),
    ("in the top right corner", "at the top right"),
    ("on the left", "on the left side"),
    ("in the centre", "in the middle"),
    ("on the right", "on the right side"),
    ("in the bottom left corner", "at the bottom left"),
    ("at the bottom", "in the middle of the bottom"),
    ("in the bottom right corner", "at the bottom right"),
)
SIZES = {"small": 28, "": 38, "large": 50}
HUGE = 76  # fits the centre only
SIDES = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
INVENTED = 0.7
"""Share of the referenced subjects that `invented` is asked for; one of twelve of these comes back as it is drawn."""
INVENTED_THERE = 0.5
"""Share of what stands in the pictures to edit; the rest must do for learning names."""
APART = 38  # from middle to middle of what stands side by side, px
GROW, SHRINK = 1.45, 0.65


@dataclass(frozen=True, eq=False)
class Case:
    """One question to the model, with its answer.

    Attributes:
        kind: of task, a key of `KINDS`.
        references: the pictures of the prompt, in order. source: which of them is edited, None for the subject task.
        asked: the subjects of the target that came from a reference, or that an edit added or changed.
    """

    kind: str
    task: Task
    prompt: str
    target: Scene
    references: tuple[Scene, ...]
    source: int | None
    asked: tuple[Placed, ...] = ()


def sample(
    rng: np.random.Generator,
    subjects: Sequence[int],
    mixture: Mapping[str, float] | None = None,
    *,
    invent: bool = False,
) -> Case:
    """A case of a kind drawn by the weights of `mixture` (default `MIXTURE`); the rest as `make`."""
    mixture = MIXTURE if mixture is None else mixture
    weights = np.array(list(mixture.values()), dtype=float)
    kind = list(mixture)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return make(kind, rng, subjects, invent=invent)


def make(kind: str, rng: np.random.Generator, subjects: Sequence[int], *, invent: bool = False) -> Case:
    """A case of one kind about the given subjects; those that are called by a name are always seen ones.

    invent: most subjects that a reference shows, and half of those in pictures to edit, are no drawing of the sheet:
    turned by quarters, or joined of two drawings along a line (as CutMix, arXiv 1905.04899, joins pictures), or both.
    A model that has only some hundred drawings to learn from remembers them else, and doesn't look at a new one.
    """
    return KINDS[kind](_Author(rng, subjects, invent))


class _Author:
    """Draws the pieces of a case: scenes, subjects, words."""

    def __init__(self, rng: np.random.Generator, subjects: Sequence[int], invent: bool):
        self.rng, self.subjects, self.invent = rng, subjects, invent
        self.named = set(sprites.split()[0])
        self.used: set[int] = set()

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, options: Sequence):
        return options[int(self.rng.integers(len(options)))]

    def scatter(self, spread: float) -> float:
        return float(self.rng.uniform(-spread, spread))

    def subject(self, *, named: bool = False, lopsided: bool = False) -> int:
        """A subject that this case does not show yet; `named`: one whose name the model can know."""
        while True:
            number = int(self.pick(sprites.split()[0] if named else self.subjects))
            if number not in self.used and (not lopsided or sprites.is_lopsided()[number]):
                self.used.add(number)
                return number

    def variant(self) -> np.ndarray:
        return self.rng.random(backgrounds.VARIANT, dtype=np.float32)

    def background(self, other_than: int = -1) -> int:
        kind = int(self.rng.integers(backgrounds.KINDS - (other_than >= 0)))
        return kind + (0 <= other_than <= kind)

    def places(self, many: int) -> list[int]:
        return [int(place) for place in self.rng.permutation(len(PLACES))[:many]]

    def there(self, number: int, place: int, *, sizes: tuple[float, float] = (30, 48), plain: bool = False) -> Placed:
        """A subject as a scene shows it: scattered, turned, now and then mirrored or in exchanged colours."""
        x, y = middle(place)
        colour = SWAPS[0] if plain or not self.chance(0.2) else self.pick(SWAPS)
        size = float(self.rng.uniform(*sizes))
        turned = self.scatter(12), self.chance(0.5)
        placed = Placed(number, x + self.scatter(5), y + self.scatter(5), size, *turned, colour)
        return self.invented(placed) if self.invent and self.chance(INVENTED_THERE) else placed

    def scene(self, many: int | None = None, **first) -> tuple[Scene, list[int]]:
        """A scene of one to four subjects and their places; `first` is about the first subject."""
        many = int(self.rng.integers(1, 5)) if many is None else many
        places = self.places(many)
        lopsided = first.pop("lopsided", False)
        numbers = [self.subject(lopsided=lopsided and i == 0) for i in range(many)]
        traits = [first, *[{}] * many][:many]
        placed = [self.there(n, p, **t) for n, p, t in zip(numbers, places, traits, strict=True)]
        return Scene(self.background(), self.variant(), tuple(placed)), places

    def portrait(self) -> tuple[Scene, Placed]:
        """A picture of one subject alone, large, and the subject as it will appear elsewhere."""
        swap = self.pick(SWAPS) if self.chance(0.5) else SWAPS[0]
        subject = Placed(self.subject(), SIDE / 2, SIDE / 2, SIZES[""], self.scatter(12), self.chance(0.5), swap)
        subject = self.invented(subject) if self.invent and self.chance(INVENTED) else subject
        ground = backgrounds.PLAIN_WHITE if self.chance(0.4) else self.pick(backgrounds.PLAIN)
        size = float(self.rng.uniform(88, 116))
        shown = replace(subject, x=64 + self.scatter(5), y=64 + self.scatter(5), size=size)
        return Scene(ground, self.variant(), (shown,)), subject

    def invented(self, subject: Placed) -> Placed:
        """A new subject made of it: turned by quarters, in two of three cases joined with another drawing."""
        turned = replace(subject, angle=subject.angle + 90 * int(self.rng.integers(4)))
        if self.chance(1 / 3):
            return turned
        return replace(turned, other=self.subject(), cut=(self.scatter(180), self.scatter(0.4)))

    def old(self, subject: Placed, place: int) -> str:
        """How an instruction calls something in the picture: by its name, its place, or both."""
        as_drawn = np.array_equal(subject.colour, SWAPS[0]) and abs(subject.angle) < 45 and subject.other < 0
        known = subject.sprite in self.named and as_drawn
        way = self.rng.random()
        if known and way < 0.5:
            return f"the {name(subject)}"
        thing = name(subject) if known and way < 0.75 else self.pick(("object", "thing"))
        return f"the {thing} {self.pick(PLACES[place])}"

    def new(self, number: int, size: str) -> str:
        """How an instruction calls something it brings in."""
        words = f"{size} {sprites.names()[number]}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def size(self) -> str:
        return self.pick(("", "", "small", "large"))


def name(subject: Placed) -> str:
    """What an instruction calls a subject."""
    return sprites.names()[subject.sprite]


def middle(place: int) -> tuple[float, float]:
    """The middle of a place, px."""
    return RASTER[place % 3], RASTER[place // 3]


def _upright(number: int, place: int, size: str) -> Placed:
    return Placed(number, *middle(place), SIZES[size])


def _at(subject: Placed, place: int, size: float) -> Placed:
    x, y = middle(place)
    return replace(subject, x=x, y=y, size=size)


# ---- from words and references to a new picture ------------------------------------------------------------------


def _text_to_image(a: _Author) -> Case:
    kind, many = a.background(), 1 + a.chance(0.5)
    placed, words = [], []
    for place in a.places(many):
        size, number = a.size(), a.subject(named=True)
        placed.append(_upright(number, place, size))
        words.append(f"{a.new(number, size)} {a.pick(PLACES[place])}")
    return _generation(a, "text_to_image", " and ".join(words), kind, (), placed, placed)


def _one_reference(a: _Author) -> Case:
    kind, (portrait, subject) = a.background(), a.portrait()
    if a.chance(0.2):
        placed, words = _at(subject, 4, HUGE), f"a huge{PLACEHOLDER}{a.pick(PLACES[4])}"
    else:
        size, [place] = a.size(), a.places(1)
        placed, words = _at(subject, place, SIZES[size]), f"a {size}{PLACEHOLDER}{a.pick(PLACES[place])}"
    return _generation(a, "one_reference", words, kind, (portrait,), [placed], [placed])


def _two_references(a: _Author) -> Case:
    kind, portraits, placed, words = a.background(), [], [], []
    for place in a.places(2):
        portrait, subject = a.portrait()
        size = a.size()
        portraits.append(portrait)
        placed.append(_at(subject, place, SIZES[size]))
        words.append(f"a {size}{PLACEHOLDER}{a.pick(PLACES[place])}")
    return _generation(a, "two_references", " and ".join(words), kind, tuple(portraits), placed, placed)


def _reference_and_name(a: _Author) -> Case:
    kind, (portrait, subject), number = a.background(), a.portrait(), a.subject(named=True)
    one, other = a.places(2)
    size, other_size = a.size(), a.size()
    placed = [_at(subject, one, SIZES[size]), _upright(number, other, other_size)]
    words = [f"a {size}{PLACEHOLDER}{a.pick(PLACES[one])}", f"{a.new(number, other_size)} {a.pick(PLACES[other])}"]
    if a.chance(0.5):
        words.reverse()
    return _generation(a, "reference_and_name", " and ".join(words), kind, (portrait,), placed, placed[:1])


def _generation(a: _Author, kind: str, words: str, background: int, references, placed, asked) -> Case:
    where = backgrounds.PHRASES[background]
    prompt = a.pick((f"{words}, {where}", f"a picture of {words}, {where}", f"{where}, {words}", f"{words} {where}"))
    target = Scene(background, a.variant(), tuple(placed))
    return Case(kind, Task.SUBJECT, prompt, target, references, None, tuple(asked))


# ---- edits by words ----------------------------------------------------------------------------------------------


def _edit(kind: str, prompt: str, source: Scene, target: Scene, asked: Sequence[Placed]) -> Case:
    return Case(kind, Task.EDIT, prompt, target, (source,), 0, tuple(asked))


def _add(a: _Author) -> Case:
    scene, places = a.scene(many=int(a.rng.integers(0, 4)))
    number, size = a.subject(named=True), a.size()
    place = a.pick([p for p in range(len(PLACES)) if p not in places])
    new, where = _upright(number, place, size), a.pick(PLACES[place])
    prompt = a.pick(("add {} {} in{}", "put {} {} of{}", "place {} {} in{}", "insert {} {} into{}"))
    return _edit("add", prompt.format(a.new(number, size), where, PLACEHOLDER), scene, scene.with_(new), [new])


def _beside(a: _Author, plain: bool = True) -> tuple[Scene, str, tuple[float, float]]:
    """A scene with room on one side of its first subject; how that side is called, and its middle."""
    scene, places = a.scene(plain=plain)
    free = []
    for words, (dx, dy) in SIDES.items():
        column, row = places[0] % 3 + dx, places[0] // 3 + dy
        if 0 <= column < 3 and 0 <= row < 3 and row * 3 + column not in places:
            free.append((words, (dx, dy)))
    if not free:  # boxed in: start over with the subject alone
        scene = replace(scene, subjects=scene.subjects[:1])
        return _beside_alone(a, scene, places[0])
    words, (dx, dy) = a.pick(free)
    anchor = scene.subjects[0]
    return scene, f"{words} {a.old(anchor, places[0])}", (anchor.x + dx * APART, anchor.y + dy * APART)


def _beside_alone(a: _Author, scene: Scene, place: int) -> tuple[Scene, str, tuple[float, float]]:
    anchor = scene.subjects[0]
    words, (dx, dy) = a.pick(
        [(w, (dx, dy)) for w, (dx, dy) in SIDES.items() if 0 <= place % 3 + dx < 3 and 0 <= place // 3 + dy < 3]
    )
    return scene, f"{words} {a.old(anchor, place)}", (anchor.x + dx * APART, anchor.y + dy * APART)


def _add_relative(a: _Author) -> Case:
    scene, where, (x, y) = _beside(a)
    number = a.subject(named=True)
    new = Placed(number, x, y, SIZES[""])
    prompt = a.pick(("add {} {} in{}", "put {} {} in{}", "place {} {} in{}"))
    words = prompt.format(a.new(number, ""), where, PLACEHOLDER)
    return _edit("add_relative", words, scene, scene.with_(new), [new])


def _remove(a: _Author) -> Case:
    scene, places = a.scene(plain=True)
    gone = scene.subjects[0]
    prompt = a.pick(("remove {} from{}", "delete {} from{}", "erase {} in{}", "take {} out of{}"))
    words = prompt.format(a.old(gone, places[0]), PLACEHOLDER)
    return _edit("remove", words, scene, scene.without(gone), [gone])


def _replace(a: _Author) -> Case:
    scene, places = a.scene(plain=True)
    old, number = scene.subjects[0], a.subject(named=True)
    new = Placed(number, old.x, old.y, old.size)
    prompt = a.pick(("replace {} in{} with {}", "turn {} in{} into {}", "swap {} in{} for {}", "change {} in{} to {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, a.new(number, ""))
    return _edit("replace", words, scene, scene.exchange(old, new), [new])


def _background(a: _Author) -> Case:
    scene, _ = a.scene()
    kind = a.background(other_than=scene.background)
    where = backgrounds.PHRASES[kind]
    prompt = a.pick(("make{} happen {}", "change the background of{}: everything {}", "show what is in{} {}"))
    target = replace(scene, background=kind, variant=a.variant())
    return _edit("background", prompt.format(PLACEHOLDER, where), scene, target, ())


def _recolour(a: _Author) -> Case:
    scene, places = a.scene(plain=True)
    old, colour = scene.subjects[0], a.pick(list(COLOURS))
    new = replace(old, colour=tint(colour))
    prompt = a.pick(("make {} in{} {}", "paint {} in{} {}", "change the colour of {} in{} to {}", "colour {} in{} {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, colour)
    return _edit("recolour", words, scene, scene.exchange(old, new), [new])


def _move(a: _Author) -> Case:
    scene, places = a.scene(plain=True)
    old, place = scene.subjects[0], a.pick([p for p in range(len(PLACES)) if p not in places])
    x, y = middle(place)
    new, where = replace(old, x=x, y=y), a.pick(PLACES[place])
    prompt = a.pick(("move {} in{} so that it is {}", "shift {} in{}: it should be {}", "put {} in{} elsewhere, {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, where)
    return _edit("move", words, scene, scene.exchange(old, new), [new])


def _scale(a: _Author) -> Case:
    larger = a.chance(0.5)
    scene, places = a.scene(plain=True, sizes=(28, 36) if larger else (42, 52))
    old = scene.subjects[0]
    new = replace(old, size=old.size * (GROW if larger else SHRINK))
    words = ("bigger", "larger") if larger else ("smaller", "tinier")
    prompt = a.pick(("make {} in{} {}", "let {} in{} be {}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, a.pick(words))
    return _edit("scale", words, scene, scene.exchange(old, new), [new])


def _flip(a: _Author) -> Case:
    scene, places = a.scene(plain=True, lopsided=True)
    old = scene.subjects[0]
    new = replace(old, flip=not old.flip, angle=-old.angle)  # the mirror image of what is seen
    prompt = a.pick(("flip {} in{} horizontally", "mirror {} in{}", "turn {} in{} the other way round"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER)
    return _edit("flip", words, scene, scene.exchange(old, new), [new])


# ---- edits with a subject ----------------------------------------------------------------------------------------


def _subject_edit(
    kind: str, prompt: str, pictures: tuple[Scene, Scene], source: int, target: Scene, new: Placed
) -> Case:
    return Case(kind, Task.SUBJECT_EDIT, prompt, target, pictures, source, (new,))


def _add_by_reference(a: _Author) -> Case:
    scene, places = a.scene(many=int(a.rng.integers(0, 4)))
    portrait, subject = a.portrait()
    place, size = a.pick([p for p in range(len(PLACES)) if p not in places]), a.size()
    new, where = _at(subject, place, SIZES[size]), a.pick(PLACES[place])
    return _bring(a, "add_by_reference", scene, portrait, new, f"a {size}{PLACEHOLDER}", where)


def _add_by_reference_relative(a: _Author) -> Case:
    scene, where, (x, y) = _beside(a)
    portrait, subject = a.portrait()
    new = replace(subject, x=x, y=y)
    return _bring(a, "add_by_reference_relative", scene, portrait, new, PLACEHOLDER, where)


def _bring(a: _Author, kind: str, scene: Scene, portrait: Scene, new: Placed, what: str, where: str) -> Case:
    target = scene.with_(new)
    if a.chance(0.5):
        words = a.pick((f"in{PLACEHOLDER}add {what} {where}", f"in{PLACEHOLDER}put {what} {where}"))
        return _subject_edit(kind, words, (scene, portrait), 0, target, new)
    words = a.pick((f"add {what} {where} of{PLACEHOLDER}", f"put {what} {where} in{PLACEHOLDER}"))
    return _subject_edit(kind, words, (portrait, scene), 1, target, new)


def _replace_by_reference(a: _Author) -> Case:
    scene, places = a.scene(plain=True)
    portrait, subject = a.portrait()
    old = scene.subjects[0]
    new = replace(subject, x=old.x, y=old.y, size=old.size)
    prompt = a.pick(("replace {} in{}with{}", "swap {} in{}for{}", "exchange {} in{}for{}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, PLACEHOLDER)
    return _subject_edit("replace_by_reference", words, (scene, portrait), 0, scene.exchange(old, new), new)


KINDS: Mapping[str, Callable[[_Author], Case]] = {
    "text_to_image": _text_to_image,
    "one_reference": _one_reference,
    "two_references": _two_references,
    "reference_and_name": _reference_and_name,
    "add": _add,
    "add_relative": _add_relative,
    "remove": _remove,
    "replace": _replace,
    "background": _background,
    "recolour": _recolour,
    "move": _move,
    "scale": _scale,
    "flip": _flip,
    "add_by_reference": _add_by_reference,
    "add_by_reference_relative": _add_by_reference_relative,
    "replace_by_reference": _replace_by_reference,
}
MIXTURE: Mapping[str, float] = {
    "text_to_image": 4,
    "one_reference": 12,
    "two_references": 12,
    "reference_and_name": 4,
    "add": 5,
    "add_relative": 4,
    "remove": 4,
    "replace": 5,
    "background": 4,
    "recolour": 4,
    "move": 7,
    "scale": 4,
    "flip": 5,
    "add_by_reference": 8,
    "add_by_reference_relative": 5,
    "replace_by_reference": 13,
}
"""How often training shows each kind."""

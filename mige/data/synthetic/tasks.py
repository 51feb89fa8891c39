"""The world's tasks: a seed -> images, an instruction for them, and the one image that answers it.

Text to image and subject-driven scenes, nine edits, three edits with a subject. What an instruction adds stands upright
in the middle of its place, so that the answer is exact; what is there already is scattered and turned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mige.data.synthetic import edits
from mige.data.synthetic.author import HUGE, PLACES, SIZES, Author, Case
from mige.data.synthetic.scenes import Placed, Scene
from mige.data.synthetic.world import FIRST, SQUARE, Frame, World
from mige.tasks import PLACEHOLDER, Task


def sample(
    rng: np.random.Generator,
    subjects: Sequence[int],
    mixture: Mapping[str, float] | None = None,
    *,
    augment: bool = False,
    world: World = FIRST,
    frame: Frame = SQUARE,
) -> Case:
    """A case of a kind drawn by the weights of `mixture` (default `MIXTURE`); the rest as `make`."""
    mixture = MIXTURE if mixture is None else mixture
    weights = np.array(list(mixture.values()), dtype=float)
    kind = list(mixture)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return make(kind, rng, subjects, augment=augment, world=world, frame=frame)


def make(
    kind: str,
    rng: np.random.Generator,
    subjects: Sequence[int],
    *,
    augment: bool = False,
    world: World = FIRST,
    frame: Frame = SQUARE,
) -> Case:
    """A case of one kind about the given subjects of a world; what a name brings in is always a seen one.

    augment: most subjects that a reference shows, and half of those in images to edit, are no drawing of the sheet:
    turned by quarters, or joined of two drawings along a line (as CutMix, arXiv 1905.04899, joins images), or both.
    A model that has only some hundred drawings to learn from remembers them else, and doesn't look at a new one.
    """
    return KINDS[kind](Author(rng, subjects, augment, world, frame))


# ---- from words and references to a new image --------------------------------------------------------------------


def _text_to_image(a: Author) -> Case:
    kind, many = a.background(), 1 + a.chance(0.5)
    placed, words = [], []
    for place in a.places(many):
        size, number = a.size(), a.subject(named=True)
        placed.append(a.upright(number, place, size))
        words.append(f"{a.new(number, size)} {a.pick(PLACES[place])}")
    return _generation(a, "text_to_image", " and ".join(words), kind, (), placed, placed)


def _one_reference(a: Author) -> Case:
    kind, (portrait, subject) = a.background(), a.portrait()
    if a.chance(0.2):
        placed, words = a.moved_to(subject, 4, HUGE), f"a huge{PLACEHOLDER}{a.pick(PLACES[4])}"
    else:
        size, [place] = a.size(), a.places(1)
        placed, words = a.moved_to(subject, place, SIZES[size]), f"a {size}{PLACEHOLDER}{a.pick(PLACES[place])}"
    return _generation(a, "one_reference", words, kind, (portrait,), [placed], [placed])


def _two_references(a: Author) -> Case:
    kind, portraits, placed, words = a.background(), [], [], []
    for place in a.places(2):
        portrait, subject = a.portrait()
        size = a.size()
        portraits.append(portrait)
        placed.append(a.moved_to(subject, place, SIZES[size]))
        words.append(f"a {size}{PLACEHOLDER}{a.pick(PLACES[place])}")
    return _generation(a, "two_references", " and ".join(words), kind, tuple(portraits), placed, placed)


def _reference_and_name(a: Author) -> Case:
    kind, (portrait, subject), number = a.background(), a.portrait(), a.subject(named=True)
    one, other = a.places(2)
    size, other_size = a.size(), a.size()
    placed = [a.moved_to(subject, one, SIZES[size]), a.upright(number, other, other_size)]
    words = [f"a {size}{PLACEHOLDER}{a.pick(PLACES[one])}", f"{a.new(number, other_size)} {a.pick(PLACES[other])}"]
    if a.chance(0.5):
        words.reverse()
    return _generation(a, "reference_and_name", " and ".join(words), kind, (portrait,), placed, placed[:1])


def _generation(a: Author, kind: str, words: str, background: int, references, placed, asked) -> Case:
    where = a.world.phrases[background]
    prompt = a.pick((f"{words}, {where}", f"a picture of {words}, {where}", f"{where}, {words}", f"{words} {where}"))
    target = Scene(background, a.variant(), tuple(placed))
    return Case(kind, Task.SUBJECT, prompt, target, references, None, tuple(asked))


# ---- edits with a subject ----------------------------------------------------------------------------------------


def _subject_edit(kind: str, prompt: str, images: tuple[Scene, Scene], source: int, target: Scene, new: Placed) -> Case:
    return Case(kind, Task.SUBJECT_EDIT, prompt, target, images, source, (new,))


def _add_by_reference(a: Author) -> Case:
    scene, places = a.scene(many=int(a.rng.integers(0, 4)))
    portrait, subject = a.portrait()
    place, size = a.pick([p for p in range(len(PLACES)) if p not in places]), a.size()
    new, where = a.moved_to(subject, place, SIZES[size]), a.pick(PLACES[place])
    return _bring(a, "add_by_reference", scene, portrait, new, f"a {size}{PLACEHOLDER}", where)


def _add_by_reference_relative(a: Author) -> Case:
    scene, where, (x, y) = edits.beside(a)
    portrait, subject = a.portrait()
    new = replace(subject, x=x, y=y)
    return _bring(a, "add_by_reference_relative", scene, portrait, new, PLACEHOLDER, where)


def _bring(a: Author, kind: str, scene: Scene, portrait: Scene, new: Placed, what: str, where: str) -> Case:
    target = scene.with_(new)
    if a.chance(0.5):
        words = a.pick((f"in{PLACEHOLDER}add {what} {where}", f"in{PLACEHOLDER}put {what} {where}"))
        return _subject_edit(kind, words, (scene, portrait), 0, target, new)
    words = a.pick((f"add {what} {where} of{PLACEHOLDER}", f"put {what} {where} in{PLACEHOLDER}"))
    return _subject_edit(kind, words, (portrait, scene), 1, target, new)


def _replace_by_reference(a: Author) -> Case:
    scene, places = a.scene(plain=True)
    portrait, subject = a.portrait()
    old = scene.subjects[0]
    new = replace(subject, x=old.x, y=old.y, size=old.size)
    prompt = a.pick(("replace {} in{}with{}", "swap {} in{}for{}", "exchange {} in{}for{}"))
    words = prompt.format(a.old(old, places[0]), PLACEHOLDER, PLACEHOLDER)
    return _subject_edit("replace_by_reference", words, (scene, portrait), 0, scene.exchange(old, new), new)


KINDS: Mapping[str, Callable[[Author], Case]] = {
    "text_to_image": _text_to_image,
    "one_reference": _one_reference,
    "two_references": _two_references,
    "reference_and_name": _reference_and_name,
    **edits.EDITS,
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

"""What the world's cases are written with: places and sizes, subjects, scenes, and the words for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mige.data.synthetic.backgrounds import VARIANT
from mige.data.synthetic.scenes import SIDE, SWAPS, Placed, Scene
from mige.data.synthetic.world import FIRST, SQUARE, Frame, World
from mige.tasks import Task

RASTER = (26, 64, 102)  # middles of the rows and columns of places, of 128
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
AUGMENTED = 0.7
"""Share of the referenced subjects that `augmented` is asked for; one of twelve of these comes back as it is drawn."""
AUGMENTED_THERE = 0.5
"""Share of what stands in the images to edit; the rest must do for learning names."""


@dataclass(frozen=True, eq=False)
class Case:
    """One question to the model, with its answer.

    Attributes:
        kind: of task, a key of `KINDS`.
        references: the images of the prompt, in order. source: which of them is edited, None for the subject task.
        asked: the subjects of the target that came from a reference, or that an edit added or changed.
    """

    kind: str
    task: Task
    prompt: str
    target: Scene
    references: tuple[Scene, ...]
    source: int | None
    asked: tuple[Placed, ...] = ()


class Author:
    """Draws the pieces of a case: scenes, subjects, words. All images of a case have one frame."""

    def __init__(
        self,
        rng: np.random.Generator,
        subjects: Sequence[int],
        augment: bool,
        world: World = FIRST,
        frame: Frame = SQUARE,
    ):
        self.rng, self.subjects, self.augment, self.world, self.frame = rng, subjects, augment, world, frame
        self.names, self.known = world.names(), world.known()
        self.used: set[str] = set()

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.rng.random() < p

    def pick(self, options: Sequence):
        """One of the options, all alike likely."""
        return options[int(self.rng.integers(len(options)))]

    def scatter(self, spread: float) -> float:
        """Uniform in [-spread, spread]."""
        return float(self.rng.uniform(-spread, spread))

    def subject(self, *, named: bool = False, asymmetric: bool = False) -> int:
        """A subject whose name this case does not show yet; `named`: one that a name alone can ask for."""
        while True:
            number = int(self.pick(self.world.named() if named else self.subjects))
            if self.names[number] not in self.used and (not asymmetric or self.world.is_asymmetric(number)):
                self.used.add(self.names[number])
                return number

    def variant(self) -> np.ndarray:
        """The numbers in [0, 1) that a background is drawn from, float32 [VARIANT]."""
        return self.rng.random(VARIANT, dtype=np.float32)

    def background(self, other_than: int = -1) -> int:
        """A kind of background, never `other_than`."""
        kind = int(self.rng.integers(len(self.world.phrases) - (other_than >= 0)))
        return kind + (0 <= other_than <= kind)

    def places(self, many: int) -> list[int]:
        """So many different places of `PLACES`."""
        return [int(place) for place in self.rng.permutation(len(PLACES))[:many]]

    def there(self, number: int, place: int, *, sizes: tuple[float, float] = (30, 48), plain: bool = False) -> Placed:
        """A subject as a scene shows it: scattered, turned, now and then mirrored or in exchanged colours."""
        x, y = self.middle(place)
        colour = SWAPS[0] if plain or not self.chance(0.2) else self.pick(SWAPS)
        size = float(self.rng.uniform(*sizes))
        turned = self.scatter(12), self.chance(0.5)
        placed = Placed(number, x + self.scatter(5), y + self.scatter(5), size, *turned, colour)
        return self.augmented(placed) if self.augment and self.chance(AUGMENTED_THERE) else placed

    def scene(self, many: int | None = None, **first) -> tuple[Scene, list[int]]:
        """A scene of one to four subjects and their places; `first` is about the first subject."""
        many = int(self.rng.integers(1, 5)) if many is None else many
        places = self.places(many)
        asymmetric = first.pop("asymmetric", False)
        numbers = [self.subject(asymmetric=asymmetric and i == 0) for i in range(many)]
        traits = [first, *[{}] * many][:many]
        placed = [self.there(n, p, **t) for n, p, t in zip(numbers, places, traits, strict=True)]
        return Scene(self.background(), self.variant(), tuple(placed)), places

    def portrait(self) -> tuple[Scene, Placed]:
        """An image of one subject alone, large, and the subject as it will appear elsewhere."""
        swap = self.pick(SWAPS) if self.chance(0.5) else SWAPS[0]
        x, y = self.middle(4)
        subject = Placed(self.subject(), x, y, SIZES[""], self.scatter(12), self.chance(0.5), swap)
        subject = self.augmented(subject) if self.augment and self.chance(AUGMENTED) else subject
        ground = self.world.white if self.chance(0.4) else self.pick(self.world.plain)
        size = float(self.rng.uniform(88, 116))
        shown = replace(subject, x=x + self.scatter(5), y=y + self.scatter(5), size=size)
        return Scene(ground, self.variant(), (shown,)), subject

    def augmented(self, subject: Placed) -> Placed:
        """A new subject made of it: turned by quarters, in two of three cases joined with another drawing."""
        turned = replace(subject, angle=subject.angle + 90 * int(self.rng.integers(4)))
        if self.chance(1 / 3):
            return turned
        return replace(turned, other=self.subject(), cut=(self.scatter(180), self.scatter(0.4)))

    def old(self, subject: Placed, place: int) -> str:
        """How an instruction calls something in the image: by its name, its place, or both."""
        as_drawn = np.array_equal(subject.colour, SWAPS[0]) and abs(subject.angle) < 45 and subject.other < 0
        known = subject.sprite in self.known and as_drawn
        way = self.rng.random()
        if known and way < 0.5:
            return f"the {self.names[subject.sprite]}"
        thing = self.names[subject.sprite] if known and way < 0.75 else self.pick(("object", "thing"))
        return f"the {thing} {self.pick(PLACES[place])}"

    def new(self, number: int, size: str) -> str:
        """How an instruction calls something it brings in."""
        words = f"{size} {self.names[number]}".strip()
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def size(self) -> str:
        """A size of `SIZES`, every other time the usual one."""
        return self.pick(("", "", "small", "large"))

    def middle(self, place: int) -> tuple[float, float]:
        """The middle of a place, in units."""
        width, height = self.frame
        return RASTER[place % 3] * (width / SIDE), RASTER[place // 3] * (height / SIDE)

    def upright(self, number: int, place: int, size: str) -> Placed:
        """A subject as an instruction brings it in: upright in the middle of its place; `size`: a key of `SIZES`."""
        return Placed(number, *self.middle(place), SIZES[size])

    def moved_to(self, subject: Placed, place: int, size: float) -> Placed:
        """The subject in the middle of a place, its size in units."""
        x, y = self.middle(place)
        return replace(subject, x=x, y=y, size=size)

"""What a person asks for, within which limits, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mige.inference.shapes import SizeWish
from mige.tasks import Task
from mige.web.instructions import Reading, RefusedError
from mige.web.strokes import Stroke

STEPS = (1, 100)
GUIDANCE = (0.0, 20.0)
SOURCE_GUIDANCE = (0.0, 10.0)
SEEDS = (0, 2**32 - 1)
MAX_AT_ONCE = 8  # pictures of one request, made together
SafetyChecker = Callable[[Sequence[Image.Image]], Sequence[bool]]
"""Given images, mode "RGB", it says of each whether it is to be withheld."""


@dataclass(frozen=True)
class Request:
    """What one person asks for; `GenerationService.run` checks it."""

    task: Task
    instruction: str  # with "picture 1" where a picture belongs
    pictures: tuple[Path | None, ...]  # picture 1, 2, ...; the first is the one to edit, in the two tasks that edit
    seeds: tuple[int, ...]  # a picture each
    steps: int
    guidance: float
    source_guidance: float
    width: int  # px; 0, and the height too: an edit is as its source, anything else has the native size
    height: int
    negative: str = ""  # what the pictures should have nothing of; words alone
    mask: tuple[Stroke, ...] | Path | None = ()  # of picture 1: where it may change; everywhere without one
    scales: tuple[float, ...] | None = None  # of the adapters on offer; None: as they came
    reading: Reading | None = None  # of an instruction that was read already, by other rules than the page's
    wish: SizeWish | None = None  # any size the model can make, in place of width and height
    paste_back: bool = False  # an edit at its source's own resolution

    @property
    def size(self) -> SizeWish:
        """The size of the pictures."""
        return self.wish or SizeWish(height=self.height or None, width=self.width or None)


@dataclass(frozen=True)
class Defaults:
    """What the page offers before anyone touches it."""

    steps: int
    guidance: float
    source_guidance: float


@dataclass(frozen=True)
class Step:
    """A finished step of the sampler; now and then with what the pictures would be, at the size of the result."""

    number: int  # 1 .. of
    of: int
    previews: list[Image.Image] | None


@dataclass(frozen=True)
class Made:
    """The result: a picture a seed, what each was made with, and the edited picture as the model saw it (or None).

    Pictures that the safety check withheld are not among them.
    """

    pictures: list[Image.Image]
    settings: list[dict[str, Any]]
    before: Image.Image | None
    seconds: float


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The work was stopped before it was finished."""


def check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """Refuse a number out of its range; NaN is out of every range."""
    low, high = limits
    if not low <= value <= high:
        is_short = isinstance(value, float) or abs(value) < 1e300
        shown = f"{value:.10g}" if is_short else "a number of more than 300 digits"
        raise RefusedError(f"The {name} is {shown}: choose one from {low:.10g} to {high:.10g}.")

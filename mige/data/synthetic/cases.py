"""The fixed cases of mini-bench: of every kind of task the same number, half about subjects that no training sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.world import FIRST, SECOND, World, frame

SEED = 20240731  # followed by two numbers; training's samples follow its seed by one, so they never meet
PER_KIND = 104
DEVELOPMENT_SEED, TEST_SEED = 20261128, 20271128
"""Of mini-bench 2: models are chosen by the scores of the first; the second is run once, at the end."""
PER_ROW = 200


@dataclass(frozen=True, eq=False)
class BenchCase:
    """A case with its name, such as "one_reference-unseen-007"."""

    id: str
    split: str  # its subjects in training, a key of its world's splits: "seen", "unseen" or ...
    seed: int  # of the sampler's noise
    case: tasks.Case
    shape: tuple[int, int] = FIRST.shapes[0]  # height and width of its images, px
    world: World = FIRST


def make_cases(
    per_kind: int = PER_KIND, seed: int = SEED, kinds: Sequence[str] = tuple(tasks.KINDS)
) -> list[BenchCase]:
    """The benchmark: of every kind `per_kind` cases, the first half about seen subjects, the second about unseen ones.

    The same for the same seed; a smaller benchmark is a part of a larger one. Raises ValueError for an odd `per_kind`
    or an unknown kind.
    """
    if per_kind < 2 or per_kind % 2:
        raise ValueError(f"per_kind must be even and at least 2 (half seen, half unseen), got {per_kind}")
    _check_kinds(kinds)
    made = []
    for kind in kinds:
        kind_number = list(tasks.KINDS).index(kind)
        for half, (split, subjects) in enumerate(zip(("seen", "unseen"), sprites.split(), strict=True)):
            for i in range(per_kind // 2):
                n = 2 * i + half
                case = tasks.make(kind, np.random.default_rng([seed, kind_number, n]), subjects)
                made.append(BenchCase(f"{kind}-{split}-{i:03d}", split, kind_number * 100_000 + n, case))
    return made


_SHAPES = (0, 1, 0, 2, 0, 3, 0, 4)  # of the second world's, case by case: every other one is a square


def make_second_cases(
    per_row: int = PER_ROW, seed: int = DEVELOPMENT_SEED, kinds: Sequence[str] = tuple(tasks.KINDS)
) -> list[BenchCase]:
    """Mini-bench 2: of every kind and split of the second world `per_row` cases, in its shapes.

    Text to image, which shows nothing but what it names, has seen subjects alone. The same for the same seed; a smaller
    benchmark is a part of a larger one. Raises ValueError for a `per_row` below 1 or an unknown kind.
    """
    if per_row < 1:
        raise ValueError(f"per_row must be at least 1, got {per_row}")
    _check_kinds(kinds)
    made = []
    for kind in kinds:
        kind_number = list(tasks.KINDS).index(kind)
        for half, (split, subjects) in enumerate(SECOND.splits().items()):
            if kind == "text_to_image" and half:
                continue
            for i in range(per_row):
                shape = SECOND.shapes[_SHAPES[i % len(_SHAPES)]]
                rng = np.random.default_rng([seed, kind_number, half, i])
                case = tasks.make(kind, rng, subjects, world=SECOND, frame=frame(*shape))
                noise = kind_number * 100_000 + 10 * i + half
                made.append(BenchCase(f"{kind}-{split}-{i:03d}", split, noise, case, shape, SECOND))
    return made


def _check_kinds(kinds: Sequence[str]) -> None:
    if unknown := sorted(set(kinds) - tasks.KINDS.keys()):
        raise ValueError(f"the world knows no task(s) {', '.join(unknown)}; known are {', '.join(tasks.KINDS)}")

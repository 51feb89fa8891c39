"""The fixed cases of mini-bench: of every kind of task the same number, half about subjects that no training sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mige.data.synthetic import sprites, tasks

SEED = 20240731  # followed by two numbers; training's samples follow its seed by one, so they never meet
PER_KIND = 104


@dataclass(frozen=True, eq=False)
class BenchCase:
    """A case with its name, such as "one_reference-unseen-007"."""

    id: str
    split: str  # "seen" or "unseen": its subjects in training
    seed: int  # of the sampler's noise
    case: tasks.Case


def make_cases(
    per_kind: int = PER_KIND, seed: int = SEED, kinds: Sequence[str] = tuple(tasks.KINDS)
) -> list[BenchCase]:
    """The benchmark: of every kind `per_kind` cases, the first half about seen subjects, the second about unseen ones.

    The same for the same seed; a smaller benchmark is a part of a larger one. Raises ValueError for an odd `per_kind`
    or an unknown kind.
    """
    if per_kind < 2 or per_kind % 2:
        raise ValueError(f"per_kind must be even and at least 2 (half seen, half unseen), got {per_kind}")
    if unknown := sorted(set(kinds) - tasks.KINDS.keys()):
        raise ValueError(f"the world knows no task(s) {', '.join(unknown)}; known are {', '.join(tasks.KINDS)}")
    made = []
    for kind in kinds:
        kind_number = list(tasks.KINDS).index(kind)
        for half, (split, subjects) in enumerate(zip(("seen", "unseen"), sprites.split(), strict=True)):
            for i in range(per_kind // 2):
                n = 2 * i + half
                case = tasks.make(kind, np.random.default_rng([seed, kind_number, n]), subjects)
                made.append(BenchCase(f"{kind}-{split}-{i:03d}", split, kind_number * 100_000 + n, case))
    return made

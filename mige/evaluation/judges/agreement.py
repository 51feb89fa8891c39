"""How far a judge can be trusted: with itself, asked again; and whether it matters which image it sees first.

Letters: N records, R repetitions.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mige.evaluation import statistics


@dataclass(frozen=True)
class Agreement:
    """Of one measure over repetitions."""

    records: int  # with two answers or more
    same: float  # share of them whose answers are all equal
    spread: float  # mean over them of the standard deviation between answers
    alpha: float | None  # Krippendorff's; None where all answers are equal, of all records


def agreement(lines: Sequence[Mapping[str, Any]], measure: str) -> Agreement | None:
    """Agreement of the answers to one question in the plain order; None where no record has two."""
    groups = [[one["value"] for one in line["answers"] if _is(one, measure, False)] for line in lines]
    paired = [values for values in groups if len(values) > 1]
    if not paired:
        return None
    same = sum(len(set(values)) == 1 for values in paired) / len(paired)
    spread = float(np.mean([np.std(values, ddof=1) for values in paired]))
    return Agreement(len(paired), same, spread, krippendorff(paired))


def krippendorff(groups: Sequence[Sequence[float]]) -> float | None:
    """Krippendorff's alpha for interval data (Content Analysis, 2004, ch. 11): 1 is perfect, 0 what chance gives.

    groups: the values of each record, of which those with fewer than two say nothing. 1 - D_o / D_e, where D_o is the
    mean square difference of pairs within a record, D_e that of all pairs. None where all values are the same.
    """
    used = [np.asarray(values, dtype=np.float64) for values in groups if len(values) > 1]
    if not used:
        return None
    every = np.concatenate(used)
    expected = 2 * every.var(ddof=1)
    observed = sum(len(values) * 2 * values.var(ddof=1) for values in used) / len(every)
    return float(1 - observed / expected) if expected > 0 else None


def position_bias(lines: Sequence[Mapping[str, Any]], measure: str) -> tuple[float, float | None, float | None] | None:
    """Mean with its interval of how much higher a judge scores where it sees the result first; None without such pairs.

    A pair is of one record and one repetition. An interval that leaves out 0 says that the order matters.
    """
    differences, clusters = [], []
    for line in lines:
        pairs: dict[int, dict[bool, float]] = defaultdict(dict)
        for one in line["answers"]:
            if one["measure"] == measure and "value" in one:
                pairs[one["repetition"]][one["swapped"]] = one["value"]
        found = [pair[True] - pair[False] for pair in pairs.values() if len(pair) == 2]
        differences += found
        clusters += [line["id"]] * len(found)
    return statistics.interval(differences, clusters) if differences else None


def _is(answer: Mapping[str, Any], measure: str, swapped: bool) -> bool:
    return answer["measure"] == measure and answer["swapped"] == swapped and "value" in answer

"""Two runs over the same cases: paired differences with intervals, win rates, and what may be said of them.

Runs are folders of evaluate.py: RESULTS of a benchmark (evaluation/samples.jsonl) or of a mini-bench (cases.jsonl); or
of judge.py: RESULTS/judged (samples.jsonl).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mige.evaluation import statistics
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.utils.files import read_json_lines, read_json_object

EVERY = "every kind"
_LOWER = ("l1", "l2", "lpips")  # how the names of errors begin, in any case; of all other measures more is better
_OF_THE_MODEL = ("label", "model", "steps", "guidance", "source_guidance")  # in which settings may differ


@dataclass(frozen=True)
class Run:
    """The scores of one model.

    Attributes:
        rows: by id, each with a kind, a cluster and scores by measure. images: by id. protocol: what two runs share.
    """

    folder: Path
    label: str
    rows: Mapping[str, Mapping[str, Any]]
    images: Mapping[str, Path]
    protocol: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The second run less the first, of one measure and kind.

    Attributes:
        low, high: 95 % interval of the difference; None of one cluster. bound: the largest difference that counts as
        none, named by the caller before the comparison; None where none was. wins: share of cases in which the second
        is better, half of those in which both are equal, with Wilson's interval over clusters.
    """

    measure: str
    kind: str
    n: int
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    bound: float | None
    equivalent: bool | None  # None without a bound
    wins: float
    wins_low: float
    wins_high: float

    @property
    def verdict(self) -> str:
        """ "second better", "first better", "no effect larger than 0.01", both of these, or "not resolved"."""
        words = []
        if self.low is not None and not self.low <= 0 <= self.high:
            words.append("second better" if (self.difference > 0) != lower_is_better(self.measure) else "first better")
        if self.equivalent:
            words.append(f"no effect larger than {self.bound:g}")
        return ", but ".join(words) or "not resolved"


def lower_is_better(measure: str) -> bool:
    """True of errors by their name (L1, L2, LPIPS), False of similarities and shares."""
    return measure.lower().startswith(_LOWER)


def read_run(folder: Path) -> Run:
    """A folder of evaluate.py or judge.py. Raises BenchmarkError that says what is missing, which line is another's."""
    judged = (folder / "samples.jsonl").is_file()
    samples, cases = (folder if judged else folder / "evaluation") / "samples.jsonl", folder / "cases.jsonl"
    path = samples if samples.is_file() else cases
    if not path.is_file():
        raise BenchmarkError(f"{folder}: neither evaluation/samples.jsonl nor cases.jsonl; run tools/evaluate.py first")
    try:
        facts = read_json_object(samples.parent / "report.json" if path == samples else folder / "settings.json")
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{folder}: its settings cannot be read ({error}); run tools/evaluate.py again") from error
    protocol = facts.get("protocol") or {key: one for key, one in facts.items() if key not in _OF_THE_MODEL}
    found, errors = read_json_lines(path)
    rows = {}
    for number, line in found:
        name, kind, scores = line.get("id"), line.get("group", line.get("kind")), line.get("model")
        good = isinstance(name, str) and isinstance(kind, str) and isinstance(scores, dict)
        if not good or not all(isinstance(one, int | float) for one in scores.values()):
            errors.append(f"{path}, line {number}: no case with an id, a kind and scores of the model")
        else:
            rows[name] = {"kind": kind, "cluster": line.get("cluster", name), "scores": scores}
    if errors or not rows:
        what = f"{errors[0]} ({len(errors)} such lines)" if errors else f"{path}: no cases"
        raise BenchmarkError(f"{what}; run tools/evaluate.py again")
    results = folder.parent if judged else folder
    pictures = results / "images" if (results / "images").is_dir() else results
    images = {file.stem: file for file in pictures.iterdir() if file.stem in rows and file.suffix != ".json"}
    return Run(folder, str(facts.get("label") or facts.get("model") or folder.name), rows, images, protocol)


def require_same(first: Run, second: Run) -> None:
    """Raise BenchmarkError unless both are of the same cases by the same protocol."""
    keys = {**first.protocol, **second.protocol}
    differing = [f"{key}: {first.protocol.get(key)} and {second.protocol.get(key)}" for key in keys
                 if first.protocol.get(key) != second.protocol.get(key)]  # fmt: skip
    if differing:
        raise BenchmarkError(f"{first.folder} and {second.folder} follow two protocols ({'; '.join(differing)}): "
                             "evaluate both in one way")  # fmt: skip
    alone = {run.folder: sorted(run.rows.keys() - other.rows.keys())
             for run, other in ((first, second), (second, first))}  # fmt: skip
    if any(alone.values()):
        words = [f"{folder} alone has {len(ids)} ({', '.join(ids[:3])})" for folder, ids in alone.items() if ids]
        raise BenchmarkError(f"the runs are of different cases: {'; '.join(words)}; evaluate both on the same ones")


def compare(first: Run, second: Run, bounds: Mapping[str, float] = {}) -> list[Comparison]:
    """A comparison of each measure and kind, and of every kind together.

    Args:
        bounds: by measure, the largest difference that counts as none. They must be named before the scores are seen.

    Raises BenchmarkError for runs that cannot be compared and for a bound of no measure, or one that is not positive.
    """
    require_same(first, second)
    measures = list(dict.fromkeys(name for row in first.rows.values() for name in row["scores"]))
    if unknown := [name for name in bounds if name not in measures]:
        raise BenchmarkError(f"a bound of {unknown[0]!r}, expected one of {', '.join(measures)}")
    if wrong := [name for name, bound in bounds.items() if not bound > 0]:
        raise BenchmarkError(f"the bound of {wrong[0]} is {bounds[wrong[0]]:g}, expected more than 0")
    kinds = [EVERY, *dict.fromkeys(row["kind"] for row in first.rows.values())]
    return [
        _compare(first, second, ids, name, kind, bounds.get(name))
        for kind in (kinds if len(kinds) > 2 else kinds[:1])
        for name in measures
        if (ids := _having(first, second, name, kind))
    ]


def _having(first: Run, second: Run, measure: str, kind: str) -> list[str]:
    """The cases of a kind that both runs have the measure for."""
    return [one for one, row in first.rows.items() if kind in (EVERY, row["kind"])
            and measure in row["scores"] and measure in second.rows[one]["scores"]]  # fmt: skip


def _compare(first: Run, second: Run, ids: Sequence[str], measure: str, kind: str, bound: float | None) -> Comparison:
    a, b = (np.array([run.rows[one]["scores"][measure] for one in ids], dtype=np.float64) for run in (first, second))
    share = bool(np.isin([a, b], (0, 0.5, 1)).all())
    clusters = [first.rows[one]["cluster"] for one in ids]
    mean, low, high = statistics.interval(b - a, clusters, share=share)
    equivalent = None
    if bound is not None:  # two one-sided tests at 5 %: the 90 % interval inside the bounds (Schuirmann 1987)
        _, least, most = statistics.interval(b - a, clusters, share=share, level=0.9)
        equivalent = least is not None and -bound < least and most < bound
    better = np.sign(b - a) * (-1 if lower_is_better(measure) else 1)
    wins, num = float((better + 1).mean() / 2), len(set(clusters))
    spread = statistics.wilson(wins * num, num)
    means = float(a.mean()), float(b.mean())
    return Comparison(measure, kind, len(ids), *means, mean, low, high, bound, equivalent, wins, *spread)


def disagreements(first: Run, second: Run, measure: str, num: int = 10) -> list[str]:
    """The ids of the cases whose scores by a measure differ most, the largest difference first."""
    gaps = {one: abs(second.rows[one]["scores"][measure] - first.rows[one]["scores"][measure])
            for one in _having(first, second, measure, EVERY)}  # fmt: skip
    return sorted(gaps, key=lambda one: -gaps[one])[:num]

"""A model's reports of the four benchmarks beside the rows that MIGE's paper prints, with tolerances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige.evaluation.published import LOCAL, PUBLISHED, TRUE_IMAGE
from mige.evaluation.summary import read_report

RUNS = ("dreambench", "emu_edit", "magicbrush", "magicbrush_iterative", "migebench")
"""Folders of results below one folder, as verify_release.sh names them."""
TOLERANCE, PIXEL_TOLERANCE, TRUE_TOLERANCE = 0.01, 0.005, 0.0005
"""Of cosines, of L1, and of the true image's CLIP-T, in which no model and no noise is."""


@dataclass(frozen=True)
class Line:
    """One figure beside the one that is known of it."""

    run: str
    row: str
    measure: str
    found: float
    low: float | None
    high: float | None
    n: int
    of: int | None
    expected: float | None
    tolerance: float
    remark: str = ""

    @property
    def verdict(self) -> str:
        """As expected, differs, part of the set (whose figures say nothing), or nothing to compare with."""
        if self.expected is None:
            return "nothing to compare with"
        if self.of is not None and self.n < self.of:
            return "part of the set"
        return "as expected" if abs(self.found - self.expected) <= self.tolerance else "differs"


def lines(folder: Path) -> list[Line]:
    """The figures of all reports below a folder; raises BenchmarkError for a damaged report and FileNotFoundError for a
    folder without any."""
    found = []
    for run in RUNS:
        path = folder / run / "evaluation" / "report.json"
        if path.is_file():
            found += _of_report(run, read_report(path))
    if not found:
        raise FileNotFoundError(
            f"{folder}: no report of {', '.join(RUNS)}; run tools/verify_release.sh with their data"
        )
    return found


def _of_report(run: str, report: Mapping[str, Any]) -> list[Line]:
    benchmark, iterative = run.removesuffix("_iterative"), run.endswith("_iterative")
    papers = [one for one in PUBLISHED if (one.benchmark, one.method) == (benchmark, "MIGE")]
    expected = {name: value for one in papers for name, value in one.scores.items() if not iterative}
    remarks = {name: one.protocol for one in papers for name in one.scores}
    found = []
    for entry in report["table"]:
        if entry["subset"] != "all" or entry["version"] not in ("model", "target"):
            continue
        name, numbers = entry["measure"], [entry[key] for key in ("mean", "low", "high", "n", "of")]
        if entry["version"] == "model":
            tolerance = PIXEL_TOLERANCE if name.startswith(("L1", "L2")) else TOLERANCE
            remark = remarks.get(name, "") if not iterative else ""
            found.append(Line(run, "model", name, *numbers, expected.get(name), tolerance, remark))
        elif benchmark == "magicbrush" and name == LOCAL:
            remark = "no model in it: another figure means other files, captions or weights of CLIP"
            found.append(Line(run, "the true image", name, *numbers, TRUE_IMAGE[iterative], TRUE_TOLERANCE, remark))
    return found


def text(found: Sequence[Line]) -> str:
    """A Markdown table of the lines, and which runs there is no report of."""
    rows = ["| run | row | measure | found | 95 % interval | n | expected | verdict | of the expected |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for one in found:
        between = "-" if one.low is None else f"{one.low:.4f} to {one.high:.4f}"
        n = str(one.n) if one.of is None else f"{one.n} of {one.of}"
        wanted = "-" if one.expected is None else f"{one.expected:g} ± {one.tolerance:g}"
        cells = (one.run, one.row, one.measure, f"{one.found:.4f}", between, n, wanted, one.verdict, one.remark)
        rows.append(f"| {' | '.join(cells)} |")
    if missing := [run for run in RUNS if run not in {one.run for one in found}]:
        rows += ["", f"Not run: {', '.join(missing)}."]
    return "\n".join(rows)

"""What a comparison of two runs leaves for people: comparison.json, report.html with the cases that differ most."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from mige.evaluation.comparing import EVERY, Comparison, Run, disagreements, lower_is_better
from mige.reports.cases import Case
from mige.reports.page import Cell, Drawing, Section, Table, write_page
from mige.utils.files import write_text

HEADINGS = ("measure", "n", "first", "second", "second less first", "second better in", "verdict")
LEGEND = (
    "Small: 95 % intervals over clusters. Second better in: share of cases, ties counted half. No effect larger than "
    "x: the 90 % interval lies inside of -x to x (two one-sided tests at 5 %), x named before the scores were seen. "
    "Not resolved: neither can be said, which is not the same as no effect."
)


def write(
    first: Run, second: Run, compared: Sequence[Comparison], rank_by: str, case_of: Callable[[str], Case], out: Path
) -> Path:
    """Write out/comparison.json and out/report.html; returns the page's path.

    Args:
        rank_by: the measure by which the ten cases are chosen that differ most. case_of: a case by its id, with
            instruction and inputs; its outputs are put in here.
    """
    out.mkdir(parents=True, exist_ok=True)
    facts = {"first": first.label, "second": second.label, "protocol": dict(first.protocol)}
    lines = [asdict(one) | {"verdict": one.verdict} for one in compared]
    write_text(out / "comparison.json", json.dumps(facts | {"table": lines}, indent=2) + "\n")
    draw, groups = Drawing(out), {"second better": [], "first better": [], "equal": []}
    for name in disagreements(first, second, rank_by):
        scores = [run.rows[name]["scores"][rank_by] for run in (first, second)]
        detail = f"{rank_by}: first {scores[0]:.4f}, second {scores[1]:.4f}"
        beside = (("second", second.images[name]), *case_of(name).beside)
        shown = replace(case_of(name), output=first.images[name], made_by="first", beside=beside, detail=detail)
        gap = (scores[1] - scores[0]) * (-1 if lower_is_better(rank_by) else 1)
        groups["second better" if gap > 0 else "first better" if gap else "equal"].append(draw.article(shown))
    tables = [Table(HEADINGS, [_line(one) for one in compared if one.kind == kind], kind) for kind in _kinds(compared)]
    arrow = "less is better" if lower_is_better(rank_by) else "more is better"
    sections = [
        Section("Differences", tables=tables, detail=LEGEND),
        Section(
            f"Largest differences by {rank_by} ({arrow})",
            sum(map(len, groups.values())),
            groups=[(name, some) for name, some in groups.items() if some],
        ),
    ]
    summary = {"first": first.label, "second": second.label, **{k: str(v) for k, v in first.protocol.items()}}
    return write_page(out / "report.html", "Two runs compared", sections, note=note(compared), summary=summary)


def note(compared: Sequence[Comparison]) -> str:
    """How many differences chance alone would show."""
    num = sum(one.low is not None for one in compared)
    return f"{num} differences are tested at 5 %: without any true one, about {num / 20:.1f} would still be found."


def text_table(compared: Sequence[Comparison]) -> str:
    """All comparisons for a terminal."""
    lines = [("kind", *HEADINGS), *((one.kind, *map(_plain, _line(one))) for one in compared)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _kinds(compared: Sequence[Comparison]) -> list[str]:
    return sorted(dict.fromkeys(one.kind for one in compared), key=lambda kind: kind != EVERY)


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else " ".join(cell)


def _line(one: Comparison) -> tuple[Cell, ...]:
    between = f"{one.difference:+.4f}"
    if one.low is not None:
        between = between, f"{one.low:+.4f} to {one.high:+.4f}"
    wins = f"{one.wins:.1%}", f"{one.wins_low:.1%} to {one.wins_high:.1%}"
    return one.measure, str(one.n), f"{one.first:.4f}", f"{one.second:.4f}", between, wins, one.verdict


def default_measure(compared: Sequence[Comparison]) -> str:
    """The measure that most cases have, of several the first."""
    counts: Mapping[str, int] = {one.measure: one.n for one in compared if one.kind == EVERY}
    return max(counts, key=lambda name: counts[name])

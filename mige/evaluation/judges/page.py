"""What a judged run leaves for people: report.html with tables, histograms and cases with the judge's reasons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import BENCHMARKS
from mige.evaluation.judges import views
from mige.evaluation.judges.published import PUBLISHED
from mige.reports.cases import Case
from mige.reports.page import Cell, Drawing, Section, Table, histogram, write_page

SHOWN = 10  # best, median and worst cases, and errors
LEGEND = (
    "Small: 95 % intervals. *: fewer records than there should be, since an answer is missing or the run is a part."
)


def write(
    prepared: Prepared,
    facts: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    found: Mapping[str, Path],
    out: Path,
) -> Path:
    """Write out/report.html of the facts of report.json and the lines; returns its path. found: the outputs by id."""
    names, own = (
        facts["measures"],
        [name for name in facts["measures"] if any(name in line["model"] for line in lines)],
    )
    sections = [Section("Scores", tables=[*_tables(facts), *_published(prepared.name, names)], detail=LEGEND)]
    if facts["trust"]:
        sections.append(Section("The judge", tables=[_trust(facts["trust"])]))
    plots = [histogram([line["model"][name] for line in lines if name in line["model"]], name) for name in own]
    sections.append(Section("Distributions", plots=plots))
    of_id, draw = {row["id"]: row for row in prepared.rows}, Drawing(out)
    for title, some in _extremes(lines, own).items():
        articles = [draw.article(_case(of_id[line["id"]], line, found[line["id"]])) for line in some]
        sections.append(Section(title, len(articles), articles=articles))
    shown = {"model": facts["label"], **facts["protocol"], **facts["versions"]}
    title = f"{BENCHMARKS[prepared.name].title}, judged"
    return write_page(out / "report.html", title, sections, note=facts["note"], summary=shown)


def text_table(facts: Mapping[str, Any]) -> str:
    """The means, for a terminal: a line a subset."""
    rows = [("", *facts["measures"], "n"), *((label, *map(_plain, cells), n) for label, cells, n in _rows(facts))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows) + f"\n{facts['note']}"


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, list[Cell], str]]:
    """(label, a cell a measure, n) for each version and subset."""
    rows = []
    for version, subset in dict.fromkeys((entry["version"], entry["subset"]) for entry in facts["table"]):
        own = {e["measure"]: e for e in facts["table"] if (e["version"], e["subset"]) == (version, subset)}
        fewest = min(own.values(), key=lambda entry: entry["n"])
        few = fewest["of"] is not None and fewest["n"] < fewest["of"]
        label = subset if version == "model" else f"{version}: {subset}"
        cells = [_cell(own[name]) if name in own else "-" for name in facts["measures"]]
        rows.append((label, cells, f"{fewest['n']} of {fewest['of']} *" if few else str(fewest["n"])))
    return rows


def _cell(entry: Mapping[str, Any]) -> Cell:
    mean = f"{entry['mean']:.3f}"
    return mean if entry["low"] is None else (mean, f"{entry['low']:.3f} to {entry['high']:.3f}")


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else " ".join(cell)


def _tables(facts: Mapping[str, Any]) -> list[Table]:
    return [
        Table(["", *(f"{name} ↑" for name in facts["measures"]), "n"], [[label, *c, n] for label, c, n in _rows(facts)])
    ]


def _published(benchmark: str, names: Sequence[str]) -> list[Table]:
    rows = [
        [
            one.method,
            *(f"{one.scores[name]:.2f}" if name in one.scores else "-" for name in names),
            one.judge,
            one.source,
        ]
        for one in PUBLISHED
        if one.benchmark == benchmark
    ]
    heading = "published, by other judges and prompts: not comparable with these"
    return [Table(["", *names, "judge", "source"], rows, heading)] if rows else []


def _trust(found: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, facts in found.items():
        same, bias = facts.get("agreement"), facts.get("result shown first, less last")
        alpha = "-" if not same or same["alpha"] is None else f"{same['alpha']:.3f}"
        cells = [f"{same['same']:.1%}", f"{same['spread']:.3f}", alpha] if same else ["-"] * 3
        rows.append([name, *cells, _cell(bias) if bias else "-"])
    return Table(
        ["", "same answer each time", "standard deviation", "Krippendorff's alpha", "result first, less last"], rows
    )


def _extremes(lines: Sequence[Mapping[str, Any]], own: Sequence[str]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Best, median and worst by the last measure, no line twice, and those without a score."""
    groups: dict[str, Sequence[Mapping[str, Any]]] = {}
    if own:
        ranked = sorted((line for line in lines if own[-1] in line["model"]), key=lambda line: -line["model"][own[-1]])
        each = max(1, min(SHOWN, len(ranked) // 3))
        middle = max(each, (len(ranked) - each) // 2)
        last = max(middle + each, len(ranked) - each)
        groups = {"Best": ranked[:each], "Median": ranked[middle : middle + each], "Worst": ranked[last:]}
        groups = {f"{title} by {own[-1]}": some for title, some in groups.items() if some}
    errors = [line for line in lines if line["errors"]]
    return groups | ({"Answers that gave no score": errors[:SHOWN]} if errors else {})


def _case(row: Mapping[str, Any], line: Mapping[str, Any], output: Path) -> Case:
    paths = [row["image"]] if "instruction" in row else row["entity_path"]
    inputs = tuple((f"image {n}", Path(path)) for n, path in enumerate(paths, 1))
    said = [", ".join(f"{name} {value:.3f}" for name, value in line["model"].items())]
    said += [f"{one['measure']} {one['scores']}: {one['reason']}" for one in line["answers"] if "scores" in one]
    detail = "; ".join(part for part in [*said, *line["errors"]] if part)
    return Case(row["id"], line["group"], views.instruction(row), inputs, output, detail)

"""What an evaluation leaves for people: report.json, report.html with table, histograms and cases, a table as text."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import BENCHMARKS, Metric
from mige.evaluation.published import PUBLISHED, Published
from mige.evaluation.scoring import VERSIONS
from mige.reports.cases import Case
from mige.reports.page import Cell, Drawing, Section, Table, histogram, write_page
from mige.utils.files import write_text

SHOWN = 10  # best, median and worst cases
LEGEND = (
    "Small: 95 % intervals, of one sample none. Copy of the input: what a model that changes nothing would score. "
    "*: fewer samples than the benchmark has."
)


def write(
    prepared: Prepared,
    facts: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    found: Mapping[str, Path],
    out: Path,
) -> Path:
    """Write out/report.json and out/report.html; returns the page's path.

    Args:
        facts: label, protocol, versions, table (with those of other reports), notes: what report.json holds.
        rows: a line a sample. found: the outputs by id.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(facts, indent=2) + "\n")
    benchmark = BENCHMARKS[prepared.name]
    metrics = [metric for metric in prepared.metrics if any(metric.name in row["model"] for row in rows)]
    sections = [_tables(prepared, facts, metrics), Section("Distributions", plots=_plots(rows, metrics))]
    ranked = sorted(rows, key=lambda row: row["model"][metrics[0].name], reverse=not metrics[0].lower_is_better)
    of_id, draw = {row["id"]: row for row in prepared.rows}, Drawing(out)
    for name, some in _extremes(ranked).items():
        articles = [draw.article(case(of_id[row["id"]], row["model"], found[row["id"]])) for row in some]
        sections.append(Section(f"{name} by {metrics[0].name}", len(articles), articles=articles))
    summary = {"model": facts["label"], **facts["protocol"], **facts["versions"]}
    return write_page(out / "report.html", benchmark.title, sections, note=facts["note"], summary=summary)


def note(table: Sequence[Mapping[str, Any]], notes: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a reader must know of these scores, in sentences: a part of the benchmark, images changed on the way."""
    whole = next(entry for entry in table if entry["version"] == "model" and entry["subset"] == "all")
    sentences = []
    if len(rows) < whole["of"]:
        sentences.append(f"{len(rows)} of the {whole['of']} samples of this benchmark: not comparable with whole runs.")
    sentences += [f"{n} outputs were {what}." for what, n in notes.items() if n]
    if missed := [row for row in rows if row.get("entity_found") is False]:
        share = len(missed) / len(rows)
        sentences.append(f"No entity was found in {len(missed)} outputs ({share:.1%}): left out of the entity scores.")
    return " ".join(sentences)


def text_table(prepared: Prepared, facts: Mapping[str, Any]) -> str:
    """The means over all samples, for a terminal."""
    names = [m.name for m in prepared.metrics if any(entry["measure"] == m.name for entry in facts["table"])]
    lines = [("", *names, "n"), *((label, *cells, n) for label, cells, n in _lines(facts["table"], "all", names))]
    plain = [tuple(cell if isinstance(cell, str) else " ".join(cell) for cell in line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in plain) + (
        f"\n{facts['note']}" if facts["note"] else ""
    )


def _lines(table: Sequence[Mapping[str, Any]], subset: str, names: Sequence[str]) -> list[tuple[str, list[Cell], str]]:
    """(label, a cell a measure, n) for each version in a subset."""
    lines = []
    for version in dict.fromkeys(entry["version"] for entry in table):
        own = {e["measure"]: e for e in table if e["version"] == version and e["subset"] == subset}
        if own:
            cells = [_cell(own[name]) if name in own else "-" for name in names]
            first = max(own.values(), key=lambda entry: entry["n"])
            few = first["of"] is not None and first["n"] < first["of"]
            n = f"{first['n']} of {first['of']} *" if few else str(first["n"])
            lines.append((VERSIONS.get(version, version), cells, n))
    return lines


def _cell(entry: Mapping[str, Any]) -> Cell:
    """Mean and interval; of one value the mean alone."""
    mean = f"{entry['mean']:.4f}"
    return mean if entry["low"] is None else (mean, f"{entry['low']:.4f} to {entry['high']:.4f}")


def _tables(prepared: Prepared, facts: Mapping[str, Any], metrics: Sequence[Metric]) -> Section:
    names = [metric.name for metric in metrics]
    own = [one for one in PUBLISHED if one.benchmark == prepared.name]
    fitting = [one for one in own if one.fits(prepared.options, facts["clip"])]
    others = [one for one in own if one not in fitting]
    headings = ["", *(f"{metric.name} {'↓' if metric.lower_is_better else '↑'}" for metric in metrics), "n", "source"]
    tables = []
    for subset in dict.fromkeys(entry["subset"] for entry in facts["table"]):
        body = [[label, *cells, n, "measured"] for label, cells, n in _lines(facts["table"], subset, names)]
        if subset == "all":
            body += [[f"{one.method} (published)", *_published(one, names), "", one.source] for one in fitting]
        tables.append(Table(headings, body, subset))
    if others:
        body = [[one.method, *_published(one, names), one.protocol, one.source] for one in others]
        heading = "published, by another or an unstated protocol: not comparable with these"
        tables.append(Table(["", *names, "protocol", "source"], body, heading))
    return Section("Scores", tables=tables, detail=LEGEND)


def _published(one: Published, names: Sequence[str]) -> list[str]:
    return [f"{one.scores[name]:.4g}" if name in one.scores else "-" for name in names]


def _plots(rows: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> list[str]:
    values = {m.name: [row["model"][m.name] for row in rows if m.name in row["model"]] for m in metrics}
    return [histogram(some, name) for name, some in values.items()]


def _extremes(ranked: Sequence[Mapping[str, Any]]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Best, median and worst of ranked rows, no row twice."""
    each = max(1, min(SHOWN, len(ranked) // 3))
    middle = (len(ranked) - each) // 2
    groups = {"best": ranked[:each], "worst": ranked[max(each, len(ranked) - each) :]}
    taken = {row["id"] for some in groups.values() for row in some}
    median = [row for row in ranked[middle : middle + each] if row["id"] not in taken]
    return {
        name: some for name, some in (("Best", groups["best"]), ("Median", median), ("Worst", groups["worst"])) if some
    }


def case(row: Mapping[str, Any], scores: Mapping[str, float], output: Path) -> Case:
    """A row of a prepared benchmark as reports show it: inputs, instruction, output, scores by measure."""
    if "instruction" in row:  # Emu Edit's layout
        prompt, references, sources = row["instruction"], [row["image"]], [row["image"]]
    else:
        prompt, references, sources = row["multi_prompt"], row["entity_path"], row["source_path"]
    inputs = [
        (f"image {n}" + (", source" if path in sources else ""), Path(path)) for n, path in enumerate(references, 1)
    ]
    if "target" in row["score"]:
        inputs.append(("true image", Path(row["score"]["target"])))
    detail = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    detail += f"; {row['score']['caption']}" if "caption" in row["score"] else ""
    return Case(row["id"], row["score"]["group"], prompt, tuple(inputs), output, detail)

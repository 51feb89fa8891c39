"""What an evaluation leaves for people: report.json, report.html with table, histograms and cases, a table as text."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mige.evaluation.benchmarks import BENCHMARKS, Metric, Prepared
from mige.evaluation.published import PUBLISHED, Published
from mige.evaluation.scoring import VERSIONS
from mige.reports import page as report
from mige.reports.page import Case

SHOWN = 10  # best, median and worst cases
_BINS = 24
LEGEND = (
    "Small: 95 % intervals, of one sample none. Copy of the input: what a model that changes nothing would score. "
    "*: fewer samples than the benchmark has."
)
STYLE = """
.wide { overflow-x: auto; margin-bottom: 1rem; }
.wide td, .wide th { white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide small { color: var(--muted); }
.few { color: var(--note-ink); background: var(--note); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
.plots svg { width: 100%; height: auto; background: var(--card); border: 1px solid var(--rule); border-radius: .5rem; }
.plots rect { fill: var(--accent); }
.plots text { fill: var(--muted); font-size: 11px; }
""".strip()


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
    report.write_text(out / "report.json", json.dumps(facts, indent=2) + "\n")
    benchmark = BENCHMARKS[prepared.name]
    metrics = [metric for metric in benchmark.metrics if any(metric.name in row["model"] for row in rows)]
    sections = [_tables(prepared, facts, metrics), _plots(rows, metrics)]
    names = ["Scores", "Distributions"]
    ranked = sorted(rows, key=lambda row: row["model"][metrics[0].name], reverse=not metrics[0].lower_is_better)
    of_id = {row["id"]: row for row in prepared.rows}
    for n, (name, some) in enumerate(_extremes(ranked).items(), start=3):
        names.append(f"{name} by {metrics[0].name}")
        cases = [_case(of_id[row["id"]], row, found[row["id"]]) for row in some]
        sections.append(report._section(names[-1], cases, out, f"task-{n}"))
    summary = {"model": facts["label"], **facts["protocol"], **facts["versions"]}
    header = report._header(benchmark.title, facts["note"], summary, [(name, []) for name in names])
    html = report._document(benchmark.title, header, sections)
    page = out / "report.html"
    report.write_text(page, html.replace("</style>", f"{STYLE}\n</style>", 1))
    return page


def note(table: Sequence[Mapping[str, Any]], notes: Mapping[str, int], rows: Sequence[Mapping[str, Any]]) -> str:
    """What a reader must know of these scores, in sentences: a part of the benchmark, pictures changed on the way."""
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
    metrics = BENCHMARKS[prepared.name].metrics
    names = [m.name for m in metrics if any(entry["measure"] == m.name for entry in facts["table"])]
    lines = [("", *names, "n"), *((label, *cells, n) for label, cells, n in _lines(facts["table"], "all", names))]
    plain = [tuple(cell.replace("<small>", "").replace("</small>", "") for cell in line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in plain) + (
        f"\n{facts['note']}" if facts["note"] else ""
    )


def _lines(table: Sequence[Mapping[str, Any]], subset: str, names: Sequence[str]) -> list[tuple[str, list[str], str]]:
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


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None:  # of one value
        return f"{entry['mean']:.4f}"
    return f"{entry['mean']:.4f} <small>{entry['low']:.4f} to {entry['high']:.4f}</small>"


def _tables(prepared: Prepared, facts: Mapping[str, Any], metrics: Sequence[Metric]) -> str:
    names = [metric.name for metric in metrics]
    clip = facts["clip"]
    own = [one for one in PUBLISHED if one.benchmark == prepared.name]
    fitting = [one for one in own if one.fits(prepared.options, clip)]
    others = [one for one in own if one not in fitting]
    headings = ["", *(f"{metric.name} {'↓' if metric.lower_is_better else '↑'}" for metric in metrics), "n", "source"]
    html = ['<section id="task-1">\n<h2>Scores</h2>']
    for subset in dict.fromkeys(entry["subset"] for entry in facts["table"]):
        body = [[label, *cells, n, "measured"] for label, cells, n in _lines(facts["table"], subset, names)]
        if subset == "all":
            body += [[f"{one.method} (published)", *_published(one, names), "", one.source] for one in fitting]
        html.append(f"<h3>{escape(subset)}</h3>\n{_html_table(headings, body)}")
    if others:
        body = [[one.method, *_published(one, names), one.protocol, one.source] for one in others]
        html.append("<h3>published, by another or an unstated protocol: not comparable with these</h3>")
        html.append(_html_table(["", *names, "protocol", "source"], body))
    html.append(f'<p class="detail">{LEGEND}</p>\n</section>')
    return "\n".join(html)


def _published(one: Published, names: Sequence[str]) -> list[str]:
    return [f"{one.scores[name]:.4g}" if name in one.scores else "-" for name in names]


def _html_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    rows = ""
    for line in lines:
        cells = (
            escape(cell).replace("&lt;small&gt;", "<small>").replace("&lt;/small&gt;", "</small>") for cell in line
        )
        kinds = (' class="few"' if cell.endswith("*") else "" for cell in line)
        rows += "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, cells, strict=True)) + "</tr>\n"
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def _plots(rows: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> str:
    plots = "\n".join(
        histogram([row["model"][metric.name] for row in rows if metric.name in row["model"]], metric.name)
        for metric in metrics
    )
    return f'<section id="task-2">\n<h2>Distributions</h2>\n<div class="plots">\n{plots}\n</div>\n</section>'


def histogram(values: Sequence[float], name: str) -> str:
    """An SVG of how many samples have which score, in 24 bins from the least to the greatest."""
    counts, edges = np.histogram(values, bins=_BINS)
    width, height = 10, 90
    bars = "".join(
        f'<rect x="{10 + i * width}" y="{110 - height * n / counts.max():.1f}" width="{width - 1}" '
        f'height="{height * n / counts.max():.1f}"><title>{edges[i]:.3f} to {edges[i + 1]:.3f}: {n}</title></rect>'
        for i, n in enumerate(counts)
    )
    side = 20 + _BINS * width
    return (
        f'<svg viewBox="0 0 {side} 130" role="img" aria-label="histogram of {escape(name)}">{bars}'
        f'<text x="10" y="14">{escape(name)}, {len(values)} samples</text><text x="10" y="124">{edges[0]:.3f}</text>'
        f'<text x="{side - 10}" y="124" text-anchor="end">{edges[-1]:.3f}</text></svg>'
    )


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


def _case(row: Mapping[str, Any], scores: Mapping[str, Any], output: Path) -> Case:
    if "instruction" in row:  # Emu Edit's layout
        prompt, references, sources = row["instruction"], [row["image"]], [row["image"]]
    else:
        prompt, references, sources = row["multi_prompt"], row["entity_path"], row["source_path"]
    inputs = [
        (f"picture {n}" + (", source" if path in sources else ""), Path(path)) for n, path in enumerate(references, 1)
    ]
    if "target" in row["score"]:
        inputs.append(("true picture", Path(row["score"]["target"])))
    detail = ", ".join(f"{name} {value:.4f}" for name, value in scores["model"].items())
    detail += f"; {row['score']['caption']}" if "caption" in row["score"] else ""
    return Case(row["id"], row["score"]["group"], prompt, tuple(inputs), output, detail)

"""What a run of the mini-bench leaves for people: scores.json, tables, and the page with its best and worst cases."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

import mige
from mige.data.synthetic import tasks
from mige.data.synthetic.cases import PER_KIND
from mige.data.synthetic.scenes import Scenes, draw
from mige.mini import bench
from mige.mini.bench import BenchCase
from mige.mini.bench_measures import MEASURES, SHARES
from mige.reports.cases import Case
from mige.reports.page import Drawing, Section, Table, write_page
from mige.reports.thumbnails import Thumbnails
from mige.utils import images
from mige.utils.files import read_json_object, write_text

EVERY = "every kind"  # the name of the table's last rows, over all kinds that have the measure
HEADINGS = ("split", "measure", "mean", "95 % interval", "n", "copy", "VAE", "of VAE")
LEGEND = (
    "Intervals are Wilson's for shares and Student's t for L1 errors, which has none for one case. Copy: the image "
    "to edit, given back unchanged. VAE: the right answer through the model's own VAE, the bound of what it can make. "
    "Of VAE: the mean as a share of that bound."
)
NUM_SHOWN = 3  # cases shown as best, median and worst of a kind
_OVERVIEW = ("success", "identity", "background", "l1_outside")
_RANKED_SHARES, _RANKED_ERRORS = ("success", "identity", "background"), ("l1_inside", "l1_outside")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of a run -> an entry for each kind (and for every kind together), split and measure that there is.

    An entry is one of `bench.summarise` with `of`, the n of the full benchmark if all missing cases have the measure
    (without subjects a case has no L1 of them); `copy` and `vae`, the means of the two baselines, and `of_vae`, the
    mean as a share of the bound: None where it makes no sense.
    """
    rows = [*rows, *({**row, "kind": EVERY} for row in rows)]
    entries, copy, vae = (bench.summarise(rows, version) for version in ("model", "copy", "vae"))
    copies, bounds = ({(*_key(entry), entry["n"]): entry["mean"] for entry in b} for b in (copy, vae))
    for entry in entries:
        same = [e for e in entries if _key(e)[1:] == _key(entry)[1:] and e["kind"] != EVERY]
        same_cases = (*_key(entry), entry["n"])  # or a baseline would be a mean over other cases
        bound = bounds.get(same_cases)
        cases = sum(row["kind"] == entry["kind"] and entry["split"] in (row["split"], "all") for row in rows)
        missing = PER_KIND // (1 if entry["split"] == "all" else 2) - cases
        entry["of"] = sum(e["of"] for e in same) if entry["kind"] == EVERY else entry["n"] + missing
        entry |= {"copy": copies.get(same_cases), "vae": bound}
        entry["of_vae"] = entry["mean"] / bound if bound and entry["measure"] in SHARES else None
    return entries


def _key(entry: Mapping) -> tuple[str, str, str]:
    return entry["kind"], entry["split"], entry["measure"]


def text_table(rows: Sequence[Mapping]) -> str:
    """The whole table for a terminal, 110 columns wide at most; `*` marks an n below the full benchmark's."""
    lines = [("kind", *HEADINGS), *((entry["kind"], *_cells(entry)) for entry in table(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    note = _shortfall(rows)
    return "\n".join([*aligned, *([f"* {note}"] if note else [])])


def _cells(entry: Mapping) -> tuple[str, ...]:
    """An entry under HEADINGS."""
    digits = 3 if entry["measure"] in SHARES else 4
    mean, low, high, copy, vae, of_vae = (
        "-" if entry[name] is None else f"{entry[name]:.{digits}f}"
        for name in ("mean", "low", "high", "copy", "vae", "of_vae")
    )
    n = str(entry["n"]) if entry["n"] >= entry["of"] else f"{entry['n']} of {entry['of']} *"
    interval = "-" if entry["low"] is None else f"{low} to {high}"
    return entry["split"], _words(entry["measure"]), mean, interval, n, copy, vae, of_vae


def _words(measure: str) -> str:
    return measure.replace("_", " ").replace("l1", "L1")


def _shortfall(rows: Sequence[Mapping]) -> str:
    """What these rows lack of the full benchmark, in a sentence; nothing if they are all of it."""
    left_out = [kind for kind in tasks.KINDS if kind not in {row["kind"] for row in rows}]
    full = PER_KIND * len(tasks.KINDS)
    if len(rows) >= full:
        return ""
    kinds = f" Left out: {', '.join(left_out)}." if left_out else ""
    return f"Not the full benchmark: {len(rows)} of its {full} cases, so every figure is a rough one.{kinds}"


def scores_line(scores: Mapping[str, float]) -> str:
    """The scores of one image, such as "success 1, L1 outside 0.0042"."""
    words = (f"{_words(name)} {scores[name]:{'g' if name in SHARES else '.4f'}}"
             for name in MEASURES if name in scores)  # fmt: skip
    return ", ".join(words)


def ranked(rows: Sequence[Mapping]) -> list[Mapping]:
    """Rows of one kind, the best first: by the mean of their shares, then by the error, inside and outside."""

    def worth(row: Mapping) -> tuple[float, float]:
        scores = row["model"]
        shares = [scores[name] for name in _RANKED_SHARES if name in scores]
        errors = [scores[name] for name in _RANKED_ERRORS if name in scores] or [scores.get("l1_subjects", 0.0)]
        return -sum(shares) / max(1, len(shares)), sum(errors)

    return sorted(rows, key=worth)


# ---- the run's files -------------------------------------------------------------------------------------------------


def write(chosen: Sequence[BenchCase], rows: Sequence[Mapping], out: Path) -> Path:
    """Write out/scores.json and out/report.html of a run in `out`, and return the page's path.

    Args:
        chosen: the cases of the run. rows: what `bench.run` returned for them; their images lie in out/images.

    The page links to files in `out` only. Raises ValueError without rows, or if a row is of none of the cases.
    """
    of_id = {one.id: one for one in chosen}
    if strangers := [row["id"] for row in rows if row["id"] not in of_id]:
        raise ValueError(f"{len(strangers)} rows are of no case that was given, such as {strangers[0]}")
    if not rows:
        raise ValueError("got no rows, expected at least one: a report shows what a run has measured")
    path = out / "settings.json"
    settings = read_json_object(path) if path.exists() else {}
    entries, note = table(rows), _shortfall(rows)
    versions = {"mige": mige.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    scores = {"benchmark": "mini", "complete": not note, "cases": len(rows), "of": PER_KIND * len(tasks.KINDS)}
    scores |= {"settings": settings, "versions": versions, "table": entries}
    write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    kinds = [EVERY, *dict.fromkeys(row["kind"] for row in rows)]
    sections, draw = [_overview(entries)], drawing(out)
    for kind in kinds[1:]:
        own = ranked([row for row in rows if row["kind"] == kind])
        groups = [(rank, [Card(of_id[row["id"]], out / "images" / f"{row['id']}.png", row["model"]) for row in some])
                  for rank, some in _extremes(own)]  # fmt: skip
        table_of_kind = Table(HEADINGS, [_cells(entry) for entry in entries if entry["kind"] == kind])
        sections.append(section(kind, len(own), groups, draw, [table_of_kind]))
    summary = {name.replace("_", " "): str(value) for name, value in {**settings, **versions}.items()}
    return write_page(out / "report.html", "mini-bench", sections, note=note, summary=summary)


def _extremes(rows: Sequence[Mapping]) -> list[tuple[str, Sequence[Mapping]]]:
    """(best, median, worst) of ranked rows, as many of each, no row twice."""
    each = max(1, min(NUM_SHOWN, len(rows) // 3))
    middle = (len(rows) - each) // 2
    groups = {"best": range(each), "worst": range(max(each, len(rows) - each), len(rows))}
    median = [i for i in range(middle, middle + each) if not any(i in group for group in groups.values())]
    groups = {"best": groups["best"], "median": median, "worst": groups["worst"]}
    return [(name, [rows[i] for i in group]) for name, group in groups.items() if group]


def _overview(entries: Sequence[Mapping]) -> Section:
    of = {_key(entry): entry for entry in entries}
    chosen = dict.fromkeys((entry["kind"], entry["measure"]) for entry in entries if entry["measure"] in _OVERVIEW)
    lines = []
    for kind, measure in chosen:
        seen, unseen = (_cells(of[key]) if (key := (kind, split, measure)) in of else ("", _words(measure), *["-"] * 6)
                        for split in ("seen", "unseen"))  # fmt: skip
        lines.append((kind.replace("_", " "), *unseen[1:], seen[2]))
    headings = ("kind", "measure", "unseen", *HEADINGS[3:], "seen")
    return Section("Unseen subjects", tables=[Table(headings, lines)], detail=LEGEND)


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A case to look at: what a model made of it (a file in the page's folder), the scores, a remark."""

    one: BenchCase
    output: Path
    scores: Mapping[str, float]
    remark: str = ""

    @property
    def detail(self) -> str:
        """Scores and remark as one line."""
        return ", ".join(filter(None, [scores_line(self.scores), self.remark]))

    def case(self) -> Case:
        """As reports show it: inputs with their labels, instruction, output, and the truth beside it."""
        case = self.one.case
        truth, *inputs = images.to_pil(draw(Scenes.stack([case.target, *case.references])))
        labels = (f"image {n + 1}" + (", source" if n == case.source else "") for n in range(len(inputs)))
        shown = tuple(zip(labels, inputs, strict=True))
        return Case(self.one.id, case.task, case.prompt, shown, self.output, self.detail, (("truth", truth),))


def drawing(folder: Path) -> Drawing:
    """Draws cards for a page in a folder; the world's small images are kept without loss."""
    return Drawing(folder, Thumbnails(folder / "thumbnails", ".png"))


def section(
    name: str, many: int, groups: Sequence[tuple[str, Sequence[Card]]], draw: Drawing, tables: Sequence[Table] = ()
) -> Section:
    """Groups of cards, each under its heading or (an empty one) side by side."""
    drawn = [(heading, [draw.article(card.case()) for card in cards]) for heading, cards in groups]
    return Section(name.replace("_", " "), many, tables=tables, groups=drawn)

"""HTML pages on which people look at what was made, from templates/*.html and one style sheet; they need no network.

`html_page` writes a folder of cases that can be sent to somebody as it is; `write_page` any page of sections.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mige.reports.cases import MARKER, TASK_NAMES, Case, require_cases
from mige.reports.thumbnails import Outputs, Shown, Thumbnails
from mige.utils.files import write_text

MAX_CASES = 200  # of one page: more make a browser slow
_BINS = 24
_TEMPLATES = Environment(
    loader=PackageLoader("mige.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip

Cell = str | tuple[str, str]
"""What a table's cell says; of two texts the second is set small."""


@dataclass(frozen=True)
class Table:
    """A table under a heading (or none). A cell that ends in `*` is marked: fewer samples than there should be."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    heading: str = ""


@dataclass(frozen=True)
class Figure:
    """An image with its caption."""

    shown: Shown
    caption: str
    alt: str


@dataclass(frozen=True)
class Chip:
    """What stands for a marker in an instruction: its number, its image if there is one, punctuation after it."""

    number: int
    figure: Figure | None
    stop: str


@dataclass(frozen=True)
class Article:
    """A case as a page shows it; `words`: its instruction, in text and chips."""

    title: str
    words: Sequence[str | Chip]
    inputs: Sequence[Figure]
    outputs: Sequence[Figure]
    detail: str


@dataclass(frozen=True)
class Section:
    """A part of a page: tables, histograms, cases (wide), groups of cards (narrow, side by side), as far as given."""

    title: str
    count: int | None = None
    tables: Sequence[Table] = ()
    detail: str = ""
    plots: Sequence[Markup] = ()
    articles: Sequence[Article] = ()
    groups: Sequence[tuple[str, Sequence[Article]]] = ()


def write_page(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    note: str = "",
    summary: Mapping[str, str] = {},
    pages: Sequence[tuple[str, str]] = (),
    back: tuple[str, str] | None = None,
) -> Path:
    """Write a page and return its path.

    Args:
        pages: links to further pages and what they hold. back: the link to the page's index, and where in it this is.
    """
    page = {"title": title, "note": note, "summary": summary, "sections": sections, "pages": pages, "back": back}
    write_text(path, _TEMPLATES.get_template("page.html").render(page))
    return path


def html_page(
    cases: Sequence[Case], folder: Path, *, title: str, note: str = "", summary: Mapping[str, str] = {}
) -> Path:
    """Write `folder/index.html`, a page of the cases grouped by task, and return its path.

    More than 200 cases go to page_1.html, page_2.html, ..., of which index.html is the index. Inputs are copied as
    thumbnails, once for each file, and outputs from elsewhere as PNG, so the folder needs nothing outside itself.
    """
    require_cases(cases)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank = {task: place for place, task in reversed(list(enumerate(case.task for case in cases)))}
    ordered = sorted(cases, key=lambda case: rank[case.task])  # tasks in order of first appearance
    draw, index = Drawing(folder), folder / "index.html"
    parts = [ordered[first : first + MAX_CASES] for first in range(0, len(ordered), MAX_CASES)]
    pages = []
    for n, part in enumerate(parts if len(parts) > 1 else [], start=1):
        file, names = f"page_{n}.html", f"{part[0].title} to {part[-1].title}"
        back = "index.html", f"page {n} of {len(parts)}"
        write_page(folder / file, title, _sections(part, draw), note=note, back=back)
        pages.append((file, f"{len(part)} cases: {names}"))
    if not pages:
        write_page(index, title, _sections(ordered, draw), note=note, summary=summary)
    else:
        counts = [(TASK_NAMES.get(task, task), str(len(list(some)))) for task, some in _by_task(ordered)]
        write_page(index, title, [], note=note, summary={**summary, **dict(counts)}, pages=pages)
    for stale in folder.glob("page_*.html"):
        if stale.name not in dict(pages):
            stale.unlink()
    return index


def _by_task(ordered: Sequence[Case]) -> Iterable[tuple[str, Iterable[Case]]]:
    return groupby(ordered, key=lambda case: case.task)


def _sections(ordered: Sequence[Case], draw: "Drawing") -> list[Section]:
    groups = ((TASK_NAMES.get(task, task), list(some)) for task, some in _by_task(ordered))
    return [Section(name, len(some), articles=[draw.article(case) for case in some]) for name, some in groups]


class Drawing:
    """Turns cases into articles of a page in a folder, their images in files beside it."""

    def __init__(self, folder: Path, inputs: Thumbnails | None = None):
        self.inputs, self.outputs = inputs or Thumbnails(folder / "inputs"), Outputs(folder)

    def article(self, case: Case) -> Article:
        """A case with its inputs, its output and what is beside it."""
        inputs = [self._figure(case, label, self.inputs.show(image)) for label, image in case.inputs]
        references = [figure for figure in inputs if figure.caption != "source"]
        outputs = [self._figure(case, case.made_by, self.outputs.show(case.output))]
        outputs += [self._figure(case, label, self.inputs.show(image)) for label, image in case.beside]
        return Article(case.title, instruction(case.instruction, references), inputs, outputs, case.detail)

    @staticmethod
    def _figure(case: Case, label: str, shown: Shown) -> Figure:
        return Figure(shown, label, f"{label} of {case.title}")


def instruction(text: str, references: Sequence[Figure]) -> list[str | Chip]:
    """An instruction in text and chips: each marker becomes a chip with its number and, if there is one, its image."""
    first, *rest = MARKER.split(text)
    words: list[str | Chip] = [first]
    for number, after in enumerate(rest, start=1):
        stop = re.match(r"[^\w\s]{0,3}", after).group()  # a comma stays on the line of its chip
        figure = references[number - 1] if number <= len(references) else None
        words += [Chip(number, figure, stop), after[len(stop) :]]
    return words


def histogram(values: Sequence[float], name: str) -> Markup:
    """An SVG of how many samples have which score, in 24 bins from the least to the greatest."""
    counts, edges = np.histogram(values, bins=_BINS)
    bins = [(int(n), 90 * n / counts.max(), edges[i], edges[i + 1]) for i, n in enumerate(counts)]
    facts = {"bins": bins, "name": name, "many": len(values), "low": edges[0], "high": edges[-1]}
    return Markup(_TEMPLATES.get_template("histogram.html").render(facts))

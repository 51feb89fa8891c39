"""Contact sheets and the page on which people look at what was made.

`contact_sheet` draws PNG files for a quick glance; `html_page` writes a folder that can be sent to somebody as it is.
"""

import hashlib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from mige.utils.files import write_text
from mige.utils.images import open_image, save_image

Picture = Image.Image | Path

MARKER = re.compile("<imagehere>", re.IGNORECASE)
TASK_NAMES = {
    "subject": "Subject-driven generation",
    "edit": "Instruction-based editing",
    "subject_edit": "Subject-driven editing",
}


@dataclass(frozen=True)
class Case:
    """One row of a report: what went in, what was asked for, what came out.

    `inputs` are (label, picture) pairs. A picture labelled "source" stands outside the text; the others are the
    references, and the k-th `<imagehere>` of the instruction means the k-th of them.
    """

    title: str
    task: str
    instruction: str
    inputs: tuple[tuple[str, Picture], ...]
    output: Picture
    detail: str


# ---- contact sheet ---------------------------------------------------------------------------------------------------

ROWS_PER_SHEET = 50
SHEET_HEIGHT = 32_000  # many viewers stop at 32767 pixels a side
MARGIN, GAP, TILE_GAP = 24, 20, 8
PAPER, TILE_PAPER, INK, MUTED, RULE, NOTE_PAPER = "#ffffff", "#f1f0ed", "#1d1d20", "#6a6a72", "#e3e1dc", "#fbf1d9"


def contact_sheet(cases: Sequence[Case], path: Path, *, note: str = "", tile: int = 256) -> list[Path]:
    """Draw one row per case (inputs, instruction, output) into a PNG and return the files written.

    Cases that do not fit on one sheet go on to `name_2.png`, `name_3.png`, ...: none is left out.
    """
    _require_cases(cases)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = _Columns(tile, most_inputs=max(len(case.inputs) for case in cases))
    per_sheet = max(1, min(ROWS_PER_SHEET, SHEET_HEIGHT // (columns.row_height + GAP)))
    sheets = [cases[start : start + per_sheet] for start in range(0, len(cases), per_sheet)]
    paths = [path] + [path.with_stem(f"{path.stem}_{number}") for number in range(2, len(sheets) + 1)]
    for number, (rows, sheet_path) in enumerate(zip(sheets, paths, strict=True), start=1):
        page = f"sheet {number} of {len(sheets)}" if len(sheets) > 1 else ""
        save_image(_draw_sheet(rows, columns, note, page), sheet_path)
    return paths


class _Columns:
    """Where things stand on a sheet: inputs in an area at most two tiles wide, then the text, then the output."""

    def __init__(self, tile: int, most_inputs: int):
        self.tile = tile
        self.row_height = max(tile, 160)  # a title, the task, three lines of text, two of small print
        self.input_tiles = min(2, most_inputs)
        self.text_width = max(320, round(1.4 * tile))
        self.text_x = MARGIN + self.input_tiles * (tile + TILE_GAP) + (GAP if self.input_tiles else 0)
        self.output_x = self.text_x + self.text_width + GAP
        self.width = self.output_x + tile + MARGIN
        self.heading, self.body, self.small = (ImageFont.load_default(size=size) for size in (18, 16, 13))


def _draw_sheet(rows: Sequence[Case], columns: _Columns, note: str, page: str) -> Image.Image:
    note_lines = _wrap(note, columns.body, columns.width - 2 * MARGIN - 24, lines=6)
    note_height = 22 * len(note_lines) + 20 + GAP if note_lines else 0
    rows_y = MARGIN + note_height + 26
    sheet = Image.new("RGB", (columns.width, rows_y + len(rows) * (columns.row_height + GAP) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    if note_lines:
        box = (MARGIN, MARGIN, columns.width - MARGIN, MARGIN + note_height - GAP)
        draw.rounded_rectangle(box, radius=8, fill=NOTE_PAPER)
        _draw_lines(draw, (MARGIN + 12, MARGIN + 10), note_lines, columns.body, 22)
    headings = {columns.text_x: "instruction", columns.output_x: "output"}
    if columns.input_tiles:
        headings[MARGIN] = "inputs"
    for x, name in headings.items():
        draw.text((x, rows_y - 26), name, fill=MUTED, font=columns.small)
    draw.text((columns.width - MARGIN, rows_y - 26), page, fill=MUTED, font=columns.small, anchor="ra")
    for index, case in enumerate(rows):
        y = rows_y + index * (columns.row_height + GAP)
        if index:
            draw.line((MARGIN, y - GAP // 2, columns.width - MARGIN, y - GAP // 2), fill=RULE)
        _draw_inputs(sheet, case.inputs, y, columns)
        _draw_text(draw, case, y, columns)
        _paste(sheet, case.output, (columns.output_x, y), columns.tile)
    return sheet


def _draw_inputs(sheet: Image.Image, inputs: Sequence[tuple[str, Picture]], y: int, columns: _Columns) -> None:
    # Two inputs fill the area at full size; more of them share it in a finer grid of 2k columns and k rows.
    split = max(1, math.ceil(math.sqrt(len(inputs) / 2)))
    pitch = (columns.tile + TILE_GAP) // split
    draw = ImageDraw.Draw(sheet)
    for index, (label, picture) in enumerate(inputs):
        row, column = divmod(index, 2 * split)
        corner = (MARGIN + column * pitch, y + row * pitch)
        _paste(sheet, picture, corner, pitch - TILE_GAP)
        for line in _wrap(label, columns.small, pitch - TILE_GAP - 16, lines=1):
            width = columns.small.getlength(line) + 12
            draw.rounded_rectangle((*corner, corner[0] + width, corner[1] + 20), radius=5, fill=INK)
            draw.text((corner[0] + 6, corner[1] + 10), line, fill=PAPER, font=columns.small, anchor="lm")


def _draw_text(draw: ImageDraw.ImageDraw, case: Case, y: int, columns: _Columns) -> None:
    numbers = iter(range(1, len(MARKER.findall(case.instruction)) + 1))
    spaced = " ".join(MARKER.sub(lambda _: f" [{next(numbers)}] ", case.instruction).split())
    instruction = re.sub(r" (?=[.,;:!?])", "", spaced)
    x, width, bottom = columns.text_x, columns.text_width, y + columns.row_height
    title = _wrap(case.title, columns.heading, width, lines=1)
    task = _wrap(TASK_NAMES.get(case.task, case.task), columns.small, width, lines=1)
    detail = _wrap(case.detail, columns.small, width, lines=2)
    room = columns.row_height - 52 - 18 * len(detail) - 8
    _draw_lines(draw, (x, y), title, columns.heading, 26)
    _draw_lines(draw, (x, y + 26), task, columns.small, 18, MUTED)
    _draw_lines(draw, (x, y + 52), _wrap(instruction, columns.body, width, lines=room // 22), columns.body, 22)
    _draw_lines(draw, (x, bottom - 18 * len(detail)), detail, columns.small, 18, MUTED)


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont,
    pitch: int,
    ink: str = INK,
) -> None:
    for index, line in enumerate(lines):
        draw.text((corner[0], corner[1] + index * pitch), line, fill=ink, font=font)


def _paste(sheet: Image.Image, picture: Picture, corner: tuple[int, int], side: int) -> None:
    image = _fit(_load(picture), side, enlarge=True)
    ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), fill=TILE_PAPER)
    sheet.paste(image, (corner[0] + (side - image.width) // 2, corner[1] + (side - image.height) // 2))


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
    """Break text into at most `lines` lines no wider than `width`; an ellipsis marks what did not fit."""
    wrapped, line = [], ""
    words = _drawable(text).split()[::-1]
    while words and len(wrapped) < lines:
        word = words.pop()
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
        elif line:
            wrapped, line = [*wrapped, line], ""
            words.append(word)
        else:  # a word wider than the column is cut where the column ends
            cut = next((n for n in range(2, len(word)) if font.getlength(word[:n]) > width), len(word)) - 1 or 1
            wrapped.append(word[:cut])
            words += [word[cut:]] if word[cut:] else []
    if line:
        wrapped.append(line)
    if words:
        last = wrapped[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        wrapped[-1] = last.rstrip() + "…"
    return wrapped


def _drawable(text: str) -> str:
    """Fold text to the ASCII that Pillow's own font can draw: accents are dropped, other scripts become "?"."""
    text = text.translate(str.maketrans("‘’“”–—×→•", "''\"\"--x>*"))
    letters = (char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return "".join(char if char.isascii() or char.isspace() else "?" for char in letters)


# ---- page ------------------------------------------------------------------------------------------------------------

THUMBNAIL = 512
STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #1d1d20; --muted: #696971; --rule: #e5e2dc;
  --well: #f1efeb; --accent: #0b6670; --note: #fbf1d9; --note-ink: #5c4508; }
@media (prefers-color-scheme: dark) { :root { --paper: #151517; --card: #1d1d20; --ink: #ebeae7; --muted: #9d9ca4;
  --rule: #323236; --well: #28282c; --accent: #7fcbd3; --note: #3a301a; --note-ink: #f0dcab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 88rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; font-size: 1.6rem; font-weight: 650; line-height: 1.25; letter-spacing: -0.01em; }
h2 { margin: 2.5rem 0 1rem; font-size: 1.15rem; font-weight: 600; }
h2 span { color: var(--muted); font-weight: 400; }
h3 { margin: 0; font-size: .95rem; font-weight: 600; }
a { color: var(--accent); }
.note { margin: 0 0 1rem; padding: .7rem 1rem; border-radius: .5rem; background: var(--note); color: var(--note-ink); }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .2rem 1.5rem .2rem 0; text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 400; white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-top: 1rem; font-size: .9rem; }
article { display: grid; gap: 1rem; margin-bottom: 1rem; padding: 1rem; border: 1px solid var(--rule);
  border-radius: .75rem; background: var(--card); }
figure { margin: 0; min-width: 0; }
figure > a { display: block; border-radius: .4rem; background: var(--well); overflow: hidden; }
figure img { display: block; width: 100%; height: auto; max-height: 32rem; object-fit: contain; }
figcaption { margin-top: .3rem; color: var(--muted); font-size: .8rem; }
.inputs { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .75rem; align-content: start; }
.inputs:has(> :only-child) { grid-template-columns: minmax(0, 1fr); }
.inputs figure:not(:only-child) img { aspect-ratio: 1; }
.instruction { margin: .5rem 0; font-size: 1.1rem; line-height: 1.9; white-space: pre-line; }
.detail { margin: 0; color: var(--muted); font-size: .8rem; }
.chip { display: inline-flex; align-items: center; vertical-align: middle; height: 1.7rem; padding-right: .45rem;
  border: 1px solid var(--rule); border-radius: .4rem; background: var(--well); overflow: hidden; color: var(--accent);
  font-size: .8rem; font-weight: 600; line-height: 1; text-decoration: none; }
.whole { white-space: nowrap; }
.chip img { width: 1.7rem; height: 1.7rem; object-fit: cover; }
.chip b { padding-left: .45rem; font-weight: 600; }
@media (min-width: 60rem) {
  body { padding: 3rem 2.5rem 6rem; }
  article { grid-template-columns: 6fr 5fr 6fr; gap: 1.75rem; padding: 1.5rem; }
  .inputs { order: -1; }
  .inputs:has(> :nth-child(5)) { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
""".strip()


def html_page(
    cases: Sequence[Case], folder: Path, *, title: str, note: str = "", summary: Mapping[str, str] = {}
) -> Path:
    """Write `folder/index.html`, a page of the cases grouped by task, and return its path.

    Inputs are copied as thumbnails and outputs from elsewhere as PNG, so the folder needs nothing outside itself.
    """
    _require_cases(cases)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rank = {task: place for place, task in reversed(list(enumerate(case.task for case in cases)))}
    ordered = sorted(cases, key=lambda case: rank[case.task])  # tasks in order of first appearance
    groups = [(task, list(group)) for task, group in groupby(ordered, key=lambda case: case.task)]
    sections = [_section(task, group, folder, f"task-{n}") for n, (task, group) in enumerate(groups, start=1)]
    page = folder / "index.html"
    write_text(page, _document(title, _header(title, note, summary, groups), sections))
    return page


def _document(title: str, header: str, sections: Sequence[str]) -> str:
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>",
            header,
            "<main>",
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _header(title: str, note: str, summary: Mapping[str, str], groups: Sequence[tuple[str, list[Case]]]) -> str:
    parts = [f"<h1>{escape(title)}</h1>"]
    if note:
        parts.append(f'<p class="note">{escape(note)}</p>')
    if summary:
        rows = (f'<tr><th scope="row">{escape(k)}</th><td>{escape(str(v))}</td></tr>' for k, v in summary.items())
        parts.append("<table>" + "".join(rows) + "</table>")
    if len(groups) > 1:
        links = (f'<a href="#task-{n}">{_task_name(task)}</a>' for n, (task, _) in enumerate(groups, start=1))
        parts.append('<nav aria-label="Tasks">' + "".join(links) + "</nav>")
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _section(task: str, cases: Sequence[Case], folder: Path, anchor: str) -> str:
    articles = "\n".join(_article(case, folder) for case in cases)
    return f'<section id="{anchor}">\n<h2>{_task_name(task)} <span>{len(cases)}</span></h2>\n{articles}\n</section>'


def _article(case: Case, folder: Path) -> str:
    inputs = [(label, *_store(_fit(_load(picture), THUMBNAIL), folder / "inputs")) for label, picture in case.inputs]
    references = [(label, link) for label, link, _ in inputs if label != "source"]
    figures = "".join(_figure(link, size, f"{label} of {case.title}", label) for label, link, size in inputs)
    output = _figure(*_output(case.output, folder), f"output of {case.title}", "output")
    return (
        f'<article>\n<div class="text"><h3>{escape(case.title)}</h3>\n'
        f'<p class="instruction" dir="auto">{_instruction(case.instruction, references)}</p>\n'
        f'<p class="detail">{escape(case.detail)}</p></div>\n'
        f'<div class="inputs">{figures}</div>\n{output}\n</article>'
    )


def _figure(link: str, size: tuple[int, int], alt: str, caption: str) -> str:
    image = f'<img src="{link}" alt="{escape(alt)}" width="{size[0]}" height="{size[1]}" loading="lazy">'
    return f'<figure><a href="{link}">{image}</a><figcaption>{escape(caption)}</figcaption></figure>'


def _instruction(text: str, references: Sequence[tuple[str, str]]) -> str:
    """The instruction as HTML: each marker becomes a chip with its number and, where there is one, its picture."""
    first, *rest = MARKER.split(text)
    html = [escape(first)]
    for number, words in enumerate(rest, start=1):
        if number <= len(references):
            label, link = references[number - 1]
            chip = f'<a class="chip" href="{link}"><img src="{link}" alt="{escape(label)}"><b>{number}</b></a>'
        else:
            chip = f'<span class="chip"><b>{number}</b></span>'
        stop = re.match(r"[^\w\s]{0,3}", words).group()  # a comma stays on the line of its chip
        html += [f'<span class="whole">{chip}{escape(stop)}</span>', escape(words[len(stop) :])]
    return "".join(html)


def _output(picture: Picture, folder: Path) -> tuple[str, tuple[int, int]]:
    """Link and size of a result: the file itself when it lies inside the folder, else a copy of its pixels."""
    if isinstance(picture, Image.Image):
        return _store(_load(picture), folder / "outputs", ".png")
    inside, root = Path(picture).resolve(), folder.resolve()
    if not inside.is_relative_to(root):
        return _store(_load(picture), folder / "outputs", ".png")
    return quote(inside.relative_to(root).as_posix()), _load(picture).size


def _store(image: Image.Image, folder: Path, suffix: str = ".jpg") -> tuple[str, tuple[int, int]]:
    """Save a picture under a name made of its pixels, so that one shared by many cases is kept once: link and size."""
    name = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:16] + suffix
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / name).exists():
        save_image(image, folder / name, **({"quality": 92} if suffix == ".jpg" else {}))
    return f"{folder.name}/{name}", image.size


# ---- both ------------------------------------------------------------------------------------------------------------


def _require_cases(cases: Sequence[Case]) -> None:
    if not cases:
        raise ValueError("got no cases, expected at least one: a report shows the records of a run that made pictures")


def _task_name(task: str) -> str:
    return escape(TASK_NAMES.get(task, task))


def _load(picture: Picture) -> Image.Image:
    return picture.convert("RGB") if isinstance(picture, Image.Image) else open_image(Path(picture))


def _fit(image: Image.Image, side: int, *, enlarge: bool = False) -> Image.Image:
    """Scale a picture into a square without distortion; one that is smaller grows only if asked to."""
    scale = side / max(image.size)
    if scale == 1 or (scale > 1 and not enlarge):
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)

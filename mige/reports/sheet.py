"""Contact sheets: PNG files of all cases for a quick glance."""

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mige.reports.cases import MARKER, TASK_NAMES, Case, ImageSource, fit, load, require_cases
from mige.utils.images import save_image

ROWS_PER_SHEET = 50
SHEET_HEIGHT = 32_000  # many viewers stop at 32767 pixels a side
MARGIN, GAP, TILE_GAP = 24, 20, 8
PAPER, TILE_PAPER, INK, MUTED, RULE, NOTE_PAPER = "#ffffff", "#f1f0ed", "#1d1d20", "#6a6a72", "#e3e1dc", "#fbf1d9"


def contact_sheet(cases: Sequence[Case], path: Path, *, note: str = "", tile: int = 256) -> list[Path]:
    """Draw one row per case (inputs, instruction, output) into a PNG and return the files written.

    Cases that do not fit on one sheet go on to `name_2.png`, `name_3.png`, ...: none is left out.
    """
    require_cases(cases)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = _Columns(tile, max(len(case.inputs) for case in cases), max(len(case.beside) for case in cases))
    per_sheet = max(1, min(ROWS_PER_SHEET, SHEET_HEIGHT // (columns.row_height + GAP)))
    sheets = [cases[start : start + per_sheet] for start in range(0, len(cases), per_sheet)]
    paths = [path] + [path.with_stem(f"{path.stem}_{number}") for number in range(2, len(sheets) + 1)]
    for number, (rows, sheet_path) in enumerate(zip(sheets, paths, strict=True), start=1):
        page = f"sheet {number} of {len(sheets)}" if len(sheets) > 1 else ""
        save_image(_draw_sheet(rows, columns, note, page), sheet_path)
    return paths


class _Columns:
    """Where things are on a sheet: inputs in an area at most two tiles wide, text, output, what is beside it."""

    def __init__(self, tile: int, most_inputs: int, most_beside: int):
        self.tile = tile
        self.row_height = max(tile, 160)  # a title, the task, three lines of text, two of small print
        self.input_tiles = min(2, most_inputs)
        self.text_width = max(320, round(1.4 * tile))
        self.text_x = MARGIN + self.input_tiles * (tile + TILE_GAP) + (GAP if self.input_tiles else 0)
        self.output_x = self.text_x + self.text_width + GAP
        self.width = self.output_x + (1 + most_beside) * (tile + TILE_GAP) - TILE_GAP + MARGIN
        self.heading, self.body, self.small = (ImageFont.load_default(size=size) for size in (18, 16, 13))


def _draw_sheet(rows: Sequence[Case], columns: _Columns, note: str, page: str) -> Image.Image:
    note_lines = wrap(note, columns.body, columns.width - 2 * MARGIN - 24, lines=6)
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
        for place, (label, image) in enumerate(case.beside, start=1):
            corner = (columns.output_x + place * (columns.tile + TILE_GAP), y)
            _paste_labelled(sheet, label, image, corner, columns.tile, columns.small)
    return sheet


def _draw_inputs(sheet: Image.Image, inputs: Sequence[tuple[str, ImageSource]], y: int, columns: _Columns) -> None:
    # Two inputs fill the area at full size; more of them share it in a finer grid of 2k columns and k rows.
    split = max(1, math.ceil(math.sqrt(len(inputs) / 2)))
    pitch = (columns.tile + TILE_GAP) // split
    for index, (label, image) in enumerate(inputs):
        row, column = divmod(index, 2 * split)
        corner = (MARGIN + column * pitch, y + row * pitch)
        _paste_labelled(sheet, label, image, corner, pitch - TILE_GAP, columns.small)


def _paste_labelled(
    sheet: Image.Image, label: str, image: ImageSource, corner: tuple[int, int], side: int, font: ImageFont.FreeTypeFont
) -> None:
    _paste(sheet, image, corner, side)
    draw = ImageDraw.Draw(sheet)
    for line in wrap(label, font, side - 16, lines=1):
        draw.rounded_rectangle((*corner, corner[0] + font.getlength(line) + 12, corner[1] + 20), radius=5, fill=INK)
        draw.text((corner[0] + 6, corner[1] + 10), line, fill=PAPER, font=font, anchor="lm")


def _draw_text(draw: ImageDraw.ImageDraw, case: Case, y: int, columns: _Columns) -> None:
    numbers = iter(range(1, len(MARKER.findall(case.instruction)) + 1))
    spaced = " ".join(MARKER.sub(lambda _: f" [{next(numbers)}] ", case.instruction).split())
    instruction = re.sub(r" (?=[.,;:!?])", "", spaced)
    x, width, bottom = columns.text_x, columns.text_width, y + columns.row_height
    title = wrap(case.title, columns.heading, width, lines=1)
    task = wrap(TASK_NAMES.get(case.task, case.task), columns.small, width, lines=1)
    detail = wrap(case.detail, columns.small, width, lines=2)
    room = columns.row_height - 52 - 18 * len(detail) - 8
    _draw_lines(draw, (x, y), title, columns.heading, 26)
    _draw_lines(draw, (x, y + 26), task, columns.small, 18, MUTED)
    _draw_lines(draw, (x, y + 52), wrap(instruction, columns.body, width, lines=room // 22), columns.body, 22)
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


def _paste(sheet: Image.Image, image: ImageSource, corner: tuple[int, int], side: int) -> None:
    tile = fit(load(image), side, enlarge=True)
    ImageDraw.Draw(sheet).rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), fill=TILE_PAPER)
    sheet.paste(tile, (corner[0] + (side - tile.width) // 2, corner[1] + (side - tile.height) // 2))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, lines: int) -> list[str]:
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

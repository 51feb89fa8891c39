"""What a run leaves for people: its records with their images, as cases of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mige
from mige.data.records import Record
from mige.inference.settings import Settings
from mige.reports.cases import Case
from mige.reports.page import html_page
from mige.reports.sheet import ROWS_PER_SHEET, contact_sheet
from mige.tasks import Task


def write_pages(
    records: Sequence[Record],
    lines: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    folder: Path,
    note: str,
    sheets: bool | None,
) -> None:
    """Draw the records with what came of them.

    Args:
        lines: those of results.jsonl, by id. note: a line on top.
        sheets: draw contact sheets; None: where one holds all.
    """
    cases = [_case(record, lines[record.id], folder) for record in records]
    summary = {"model": settings.model, "seed": str(settings.seed), "weights": settings.dtype, "mige": mige.__version__}
    if len(cases) <= ROWS_PER_SHEET if sheets is None else sheets:
        contact_sheet(cases, folder / "contact_sheet.png", note=note)
    html_page(cases, folder, title="MIGE results", note=note, summary=summary)


def _case(record: Record, line: Mapping[str, Any], folder: Path) -> Case:
    inputs = tuple(
        (f"image {n}" + (", source" if path == record.source else ""), path)
        for n, path in enumerate(record.references, start=1)
    )
    detail = f"seed {line['seed']}, {line['steps']} steps, guidance {line['guidance']:g}"
    if record.task is not Task.SUBJECT:
        detail += f", source guidance {line['source_guidance']:g}"
    detail += f", {line['seconds']:.1f} s"
    return Case(record.id, record.task, record.prompt, inputs, folder / line["image"], detail)

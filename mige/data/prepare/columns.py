"""The rows of a set that a `Layout` describes -> samples of any of the three tasks."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mige.data.prepare.json_files import JsonRows
from mige.data.prepare.layout import Layout
from mige.data.prepare.readers import ParquetRows, Reader, Settings, SourceError, TarRows
from mige.data.prepare.samples import (
    ImageFile,
    ImageWriter,
    SkippedSample,
    edit_prompt,
    required_text,
    short_enough,
    subject_prompt,
)
from mige.tasks import PLACEHOLDER

READERS = {"parquet": ParquetRows, "json": JsonRows, "webdataset": TarRows}


def layout_rows(settings: Settings, columns: Sequence[str], position: Mapping[str, Any] | None) -> Reader:
    """The rows in the layout's format."""
    return READERS[settings.layout.format](settings, columns, position)


def layout_samples(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> list[dict[str, Any]]:
    """One sample of a row: an edit (source), a subject (subjects) or a subject edit (both).

    Raises SkippedSample with the record's place in its file, SourceError for a column that a table lacks.
    """
    if "problem" in row:
        raise SkippedSample("malformed JSON", row["problem"])
    cells = _Cells(row, writer, settings)
    try:
        return [_sample(cells, settings.layout)]
    except SkippedSample as skipped:
        raise SkippedSample(skipped.reason, row.get("where", "") + skipped.detail) from skipped


def _sample(cells: "_Cells", layout: Layout) -> dict[str, Any]:
    for column, least in layout.least.items():
        score = cells.value(column)
        if type(score) not in (int, float):
            raise SkippedSample(f"no number in {column}", repr(score))
        if score < least:
            raise SkippedSample(f"{column} below {least}", str(score))
    prompt = _prompt(cells, layout)
    listed = [layout.source] if layout.source and layout.source not in layout.subjects else []
    images = {column: cells.image(column) for column in dict.fromkeys([*listed, *layout.subjects])}
    target = cells.image(layout.target)
    sample = {"image": target.path, "width": target.width, "height": target.height, "multi_prompt": prompt}
    sample["entity_path"] = [image.path for image in images.values()]
    sample["source_path"] = [images[layout.source].path] if layout.source else []
    if layout.mask and cells.value(layout.mask) is not None:
        sample["mask_path"] = cells.image(layout.mask).path
    return sample | {"original_instruction": cells.value(layout.instruction), "columns": cells.kept(layout.keep)}


def _prompt(cells: "_Cells", layout: Layout) -> str:
    text = cells.value(layout.instruction)
    if isinstance(text, str) and PLACEHOLDER in text:
        return short_enough(text)
    if layout.source and set(layout.subjects) <= {layout.source}:
        return edit_prompt(text)
    if layout.item:
        return subject_prompt(text, cells.value(layout.item))
    raise SkippedSample(f"no {PLACEHOLDER} in the instruction", required_text(text, "instruction"))


class _Cells:
    """The values and images of one row by the names of the layout."""

    def __init__(self, row: Mapping[str, Any], writer: ImageWriter, settings: Settings):
        self.is_table = "fields" not in row  # all rows have the same columns
        self.fields, self.writer, self.settings = row.get("fields", row), writer, settings
        layout = settings.layout
        self.folder = settings.images or ("folder" in row and Path(row["folder"], layout.folder))
        if not isinstance(self.fields, Mapping):
            raise SkippedSample("no object", repr(self.fields)[:200])

    def value(self, column: str) -> Any:
        """What a column holds; of a list of one its item. A column of that very name comes before "a.b"."""
        first, *rest = [column] if column in self.fields else column.split(".")
        if first not in self.fields:
            has = ", ".join(map(str, self.fields))
            if self.is_table:
                name = self.settings.layout.name
                raise SourceError(
                    f"no column {first}; the rows have {has}. Correct the layout {name}, or give its files"
                )
            raise SkippedSample(f"no {column}", f"it has {has}")
        value = self.fields[first]
        for name in rest:
            try:
                value = value[int(name) if isinstance(value, Sequence) else name]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise SkippedSample(f"no {column}", repr(value)[:200]) from error
        if isinstance(value, list):
            if len(value) != 1:
                raise SkippedSample(f"{column} has not one value", f"{len(value)}: {value!r:.200}")
            value = value[0]
        return value

    def image(self, column: str) -> ImageFile:
        """The image of a column: its bytes are stored, a path is referred to below the folder of images."""
        cell = self.value(column)
        if isinstance(cell, Mapping) and cell.get("bytes") is None and isinstance(cell.get("path"), str):
            cell = cell["path"]
        if not isinstance(cell, str):
            name = column.replace(".", "_")
            return self.writer.store(name, {"bytes": cell} if isinstance(cell, bytes) else cell)
        if not self.folder:
            raise SourceError(f"{column} names images by path ({cell!r:.80}); give --images with their folder")
        if not cell or PurePosixPath(cell).is_absolute() or ".." in PurePosixPath(cell).parts:
            raise SkippedSample("path out of the images' folder", f"{column}: {cell!r}")
        return self.writer.refer(Path(self.folder, cell))

    def kept(self, columns: Sequence[str]) -> dict[str, Any]:
        """What records keep of a row; an absent value is null, and one that JSON cannot hold is text."""
        values = {column: self.fields.get(column) for column in columns}
        return {column: value if _is_plain(value) else repr(value) for column, value in values.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))

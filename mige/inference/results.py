"""The lines of a run's results: which are of finished records, whether their images are still those that were saved."""

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mige.data.records import ID_PATTERN, Record
from mige.inference.settings import Settings, is_same_file
from mige.tasks import Task
from mige.utils import images
from mige.utils.files import append_json_line, read_json_lines

_NUMBERS = ("seed", "steps", "guidance", "source_guidance", "seconds")


@dataclass
class Finished:
    """What a run folder has finished: lines by id; and what is there but does not count, a sentence each."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def read_finished(folder: Path, paths: Iterable[Path]) -> Finished:
    """The lines of these files whose image is whole and the one that was saved; of two with one id the later.

    Raises OSError where reading fails.
    """
    found, places = Finished(), {}
    for path in paths:
        rows, errors = read_json_lines(path)
        for number, row in rows:
            where = f"{path}, line {number}"
            try:
                row = _checked(folder, row)
            except ValueError as error:
                errors.append(f"{where}: {error}")
                continue
            if found.lines.get(row["id"], row) != row:
                errors.append(f"{places[row['id']]}: {row['id']!r} is finished in {where} again, which counts")
            found.lines[row["id"]], places[row["id"]] = row, where
        found.errors += errors
    return found


def _checked(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    if error := line_error(row):
        raise ValueError(f"no line of a finished record: {error}")
    return verified(folder / row["image"], row)


def line_error(row: Mapping[str, Any]) -> str | None:
    """What makes an object no line of a finished record."""
    name = row.get("id")
    if not isinstance(name, str) or not ID_PATTERN.fullmatch(name):
        return f"its id is {name!r}"
    if row.get("image") != f"images/{name}.png":
        return f"its image is {row.get('image')!r}, expected 'images/{name}.png'"
    if row.get("task") not in list(Task):
        return f"its task is {row.get('task')!r}"
    if wrong := [key for key in _NUMBERS if not _is_number(row.get(key))]:
        return f"its {wrong[0]} is {row.get(wrong[0])!r}, expected a number"
    if not _is_list_of(int, row.get("size")) or len(row["size"]) != 2:
        return f"its size is {row.get('size')!r}, expected width and height"
    record = row.get("record")
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        return f"its record is {record!r}, expected an object with the prompt"
    references, source = record.get("references"), record.get("source")
    if not _is_list_of(str, references) or not (source is None or isinstance(source, str)):
        return "its record has no paths of references and source"
    if not isinstance(record.get("mask", ""), str):
        return f"its mask is {record['mask']!r}, expected a path"
    resolved = record.get("resolved", references)
    if not _is_list_of(str, resolved) or len(resolved) != len(references):
        return f"its record has {len(references)} references that lay at {resolved!r}"
    saved = row.get("saved")
    if saved is not None and not (isinstance(saved, dict) and _is_list_of(int, list(saved.values()))):
        return f"its saved is {saved!r}, expected an object of numbers"
    if not isinstance(row.get("settings", {}), dict):
        return f"its settings are {row['settings']!r}, expected an object"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and -1e20 < value < 1e20  # what a page can show: no NaN, no 400 digits


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def verified(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """The line with the facts of its image's file as they are now.

    Decodes the image only where size and time of the file are not those of the line: where the folder was copied, or
    the line is of version 0.1, which kept no such facts. Raises ValueError, saying what is wrong, for a file that is
    not the image that was saved.
    """
    saved = row.get("saved", {})
    if saved and path.is_file():
        status = path.stat()
        if (saved.get("bytes"), saved.get("mtime_ns")) == (status.st_size, status.st_mtime_ns):
            return dict(row)
    image = images.open_image(path)  # its error is a ValueError
    if list(image.size) != row["size"]:
        raise ValueError(f"{path}: {image.width} x {image.height}, expected {row['size'][0]} x {row['size'][1]}")
    now = _facts(path, image)
    if saved and saved.get("pixels") != now["pixels"]:
        raise ValueError(f"{path}: another image than the one that was saved")
    return {**row, "saved": now}


def _facts(path: Path, image: Image.Image) -> dict[str, int]:
    """Size and time of an image's file, and the CRC-32 of its RGB values."""
    status = path.stat()
    pixels = zlib.crc32(image.convert("RGB").tobytes())
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "pixels": pixels}


class ResultsWriter:
    """A process's lines, one a record, each written after its image: the truth about what is finished."""

    def __init__(self, folder: Path, name: str, settings: Settings):
        self.folder, self.path, self.settings = folder, folder / name, settings.changed()

    def save(self, record: Record, image: Image.Image) -> dict[str, int]:
        """Save the image, from any thread; what the line says of its file. On the disk when this returns."""
        path = self.folder / _name(record)
        images.save_image(image, path)
        return _facts(path, image)

    def add(self, record: Record, facts: Mapping[str, Any], saved: Future[dict[str, int]]) -> None:
        """Append the line once its image is `saved`; `facts`: further fields. On the disk when this returns."""
        line = {"id": record.id, "task": record.task, "image": _name(record), "record": identity(record), **facts}
        append_json_line(self.path, {**line, "settings": self.settings, "saved": saved.result()})


def _name(record: Record) -> str:
    return f"images/{record.id}.png"


def identity(record: Record) -> dict[str, Any]:
    """What makes a record the one that a line is of."""
    return {
        "prompt": record.prompt,
        "edit_type": record.edit_type,
        "references": [str(path) for path in record.references],
        "source": None if record.source is None else str(record.source),
        "resolved": [os.path.realpath(path) for path in record.references],
        **({} if record.mask is None else {"mask": str(record.mask)}),
    }


def is_of(line: Mapping[str, Any], record: Record) -> bool:
    """Whether a line is of this record: the same words and the same files, however their paths are spelt."""
    there = line["record"]
    references = there["references"]
    if (there["prompt"], there.get("edit_type")) != (record.prompt, record.edit_type):
        return False
    if len(references) != len(record.references) or (there["source"] is None) != (record.source is None):
        return False
    if (there.get("mask") is None) != (record.mask is None):
        return False
    resolved = dict(zip(references, there.get("resolved", [None] * len(references)), strict=True))
    pairs = [*zip(references, record.references, strict=True)]
    pairs += [] if record.source is None else [(there["source"], record.source)]
    pairs += [] if record.mask is None else [(there["mask"], record.mask)]
    return all(is_same_file(known, resolved.get(known), path) for known, path in pairs)

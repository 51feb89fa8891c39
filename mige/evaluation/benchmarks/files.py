"""Files of a benchmark: what is read of them and how they are refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mige.utils.errors import UserError
from mige.utils.files import write_bytes


class BenchmarkError(UserError, RuntimeError):
    """Files of a benchmark, or results, that cannot be used: what was found, what was expected, what to do."""


@dataclass(frozen=True)
class Options:
    """What decides the rows of a prepared benchmark."""

    data: str  # folder of the benchmark's own files, or its name on the hub
    root: str | None = None  # MIGEBench: where its placeholder paths lead; by default the data
    split: str = "validation"  # Emu Edit: validation (3,589 rows) or test (2,022)
    samples: int = 1  # DreamBench: images a prompt; the paper of DreamBooth makes 4
    against: str = "input"  # DreamBench: compare with the one input, or with "all" images of the subject
    iterative: str | None = None  # MagicBrush: folder of results whose images the next turns start from


def read_json(path: Path, what: str, kind: type) -> Any:
    """The object or list (`kind`) in a JSON file of `what`. Raises BenchmarkError for anything else."""
    try:
        found = json.loads(read_file(path, what))
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path}: no JSON ({error}); fetch or make the file again") from error
    if not isinstance(found, kind):
        message = f"JSON of type {type(found).__name__}, expected a {kind.__name__}"
        raise BenchmarkError(f"{path}: {message}; fetch or make the file again")
    return found


def read_file(path: Path, what: str) -> str:
    """The text of a file of `what`. Raises BenchmarkError where there is none."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise BenchmarkError(f"{path}: no such file; give the folder of {what} that holds it") from error
    except OSError as error:
        raise BenchmarkError(f"{path}: cannot be read ({error.strerror}); correct it, or prepare it again") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path}: no UTF-8 text ({error.reason}); fetch it, or prepare it again") from error


def first_of(folder: Path, *names: str) -> Path:
    """The first of these files that is there; the first name, if none is."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def existing_file(path: Path, where: str) -> Path:
    """The file's absolute path. Raises BenchmarkError that names the record, `where`, if it is not there."""
    if not path.is_file():
        raise BenchmarkError(f"{where}: no file {path}; fetch it or correct --root")
    return path.resolve()


def checked_text(value: Any, where: str, name: str) -> str:
    """The value if it is a text with something in it. Raises BenchmarkError that names record and field."""
    if not isinstance(value, str) or not value.strip():
        raise BenchmarkError(f"{where}: the {name} is {value!r}, expected a text; correct the row")
    return value


def write_image(cell: Any, stem: Path, where: str) -> Path:
    """The bytes of a parquet image cell as a file, unchanged; its suffix is the format that they are in.

    Raises BenchmarkError, naming the record, `where`, for a cell without the bytes of an image.
    """
    if not isinstance(cell, Mapping) or not cell.get("bytes"):
        raise BenchmarkError(f"{where}: the image holds no bytes; fetch the files with their images embedded")
    try:
        kind = Image.open(BytesIO(cell["bytes"])).format.lower()
    except Image.UnidentifiedImageError as error:
        raise BenchmarkError(f"{where}: the image is of no known format; fetch the file again") from error
    path = stem.with_suffix(f".{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != cell["bytes"]:
        write_bytes(path, cell["bytes"])
    return path.resolve()

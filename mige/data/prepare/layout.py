"""What a data set's rows are called: a small YAML file, ours (presets/) or the user's.

format: parquet                 # or json (.json, .jsonl), webdataset (.tar)
hub: owner/name                 # what is read without --input; optional
split: train                    # the split of the hub, or how the files of a folder begin
target: edited_img              # a column; "a.b" is field b of column a, "a.0" its first item
source: src_img                 # the image to edit; without it the set is subject-driven
subjects: [ref_img]             # further references; the source comes first, or where it is listed
instruction: prompt
item: subject                   # the subject's name in an instruction without <imagehere>
mask: mask_img
folder: ../images               # what paths of images are relative to, from the folder of the rows' file
least: {score: 3.5}             # rows below are skipped
keep: [edit_type]               # columns that records keep, in their field "columns"
"""

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from mige.utils.errors import UserError

PRESETS = Path(__file__).parent / "presets"
FORMATS = ("parquet", "json", "webdataset")


class LayoutError(UserError, ValueError):
    """The layout cannot be used: which file, what is in it, what was expected."""


@dataclass(frozen=True)
class Layout:
    """The columns of a data set; see the module. Columns that are not given are None or empty."""

    name: str  # how ids begin: the name of the file
    format: str  # one of FORMATS
    target: str
    instruction: str
    hub: str | None = None
    split: str = "train"
    source: str | None = None
    subjects: tuple[str, ...] = ()
    item: str | None = None
    mask: str | None = None
    folder: str = "."
    least: dict[str, float] = field(default_factory=dict)
    keep: tuple[str, ...] = ()


def read_layout(given: str) -> Layout:
    """The layout of a preset's name or of a YAML file. Raises LayoutError where it is none."""
    path = PRESETS / f"{given}.yaml" if given in preset_names() else Path(given)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        choice = f"give a YAML file or one of {', '.join(preset_names())}"
        raise LayoutError(f"layout {given}: cannot be read: {error.strerror}; {choice}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LayoutError(f"{path}: no YAML: {' '.join(str(error).split())}; correct it there") from error
    if not isinstance(values, dict):
        raise LayoutError(f"{path}: holds {type(values).__name__}, expected keys such as target and instruction")
    _check(path, values)
    lists = {name: tuple(values[name]) for name in ("subjects", "keep") if name in values}
    return Layout(**values | lists | {"name": path.stem})


def preset_names() -> list[str]:
    """The names of the layouts that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _check(path: Path, values: dict[Any, Any]) -> None:
    known = {one.name: one for one in fields(Layout) if one.name != "name"}
    if unknown := [str(key) for key in values if key not in known]:
        raise LayoutError(f"{path}: unknown key {', '.join(unknown)}; it takes {', '.join(known)}")
    needed = [name for name, one in known.items() if one.default is MISSING and one.default_factory is MISSING]
    if absent := [name for name in needed if name not in values]:
        raise LayoutError(f"{path}: no {', '.join(absent)}; name the column, and the format of the files")
    for name, value in values.items():
        if name in ("subjects", "keep"):
            is_right, expected = (
                isinstance(value, list) and all(isinstance(one, str) for one in value),
                "a list of columns",
            )
        elif name == "least":
            numbers = value.values() if isinstance(value, dict) else [None]
            is_right, expected = all(type(one) in (int, float) for one in numbers), "a number a column"
        else:
            is_right, expected = isinstance(value, str) and bool(value), "a text"
        if not is_right:
            raise LayoutError(f"{path}: {name} is {value!r}, expected {expected}")
    if values["format"] not in FORMATS:
        raise LayoutError(f"{path}: format {values['format']!r}, expected one of {', '.join(FORMATS)}")
    if not (values.get("source") or values.get("subjects")):
        raise LayoutError(f"{path}: neither source nor subjects; a record needs a reference")

"""The authors' index of subject-driven edits: rows that name images on a machine of theirs -> samples.

The index holds text alone; its images are those of the sets that it was made from, which lie wherever they were
fetched to. `--root OLD=NEW` says where.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mige.data.json_rows import type_name
from mige.data.prepare.json_files import JsonRows
from mige.data.prepare.readers import ParquetRows, Reader, Settings, SourceError
from mige.data.prepare.samples import ImageFile, ImageWriter, SkippedSample, required_text, short_enough
from mige.tasks import Task

FIELDS = ("image", "entity_path", "source_path", "multi_prompt")  # the others may be absent
ORIGIN_NAMES = 3  # how many leading folders of a path that no root covers name where it came from


def index_rows(settings: Settings, columns: Sequence[str], position: Mapping[str, Any] | None) -> Reader:
    """The rows of local .json and .jsonl files, of local parquet files, or of a hub data set."""
    are_json = [Path(given).suffix.lower() in (".json", ".jsonl") for given in settings.inputs]
    if any(are_json) and not all(are_json):
        raise SourceError(f"{', '.join(settings.inputs)}: both JSON and other files; give one kind")
    return (JsonRows if all(are_json) else ParquetRows)(settings, columns, position)


def index_samples(row: Mapping[str, Any], writer: ImageWriter, settings: Settings) -> list[dict[str, Any]]:
    """One sample of a row. entity_path lists the source too, in the order of the markers.

    Raises SkippedSample for a row that is no object or lacks a field, for text that is no path, and for images that
    are missing, damaged or below no root: then the reason names where they came from, the detail every file.
    Masks are mapped and not opened: no training reads them.
    """
    if "problem" in row:
        raise SkippedSample("malformed JSON", row["problem"])
    fields, where = row.get("fields", row), row.get("where", "")
    if not isinstance(fields, Mapping):
        raise SkippedSample("no object", f"{where}{type_name(fields)}")
    if absent := [name for name in FIELDS if fields.get(name) is None]:
        raise SkippedSample(f"no {', '.join(absent)}", f"{where}it has {', '.join(map(str, fields))}")
    names = {name: _paths(fields, name, where) for name in ("entity_path", "source_path", "mask_path")}
    [target] = _paths({"image": [fields["image"]]}, "image", where)
    roots, failures, files = dict(settings.roots), {}, {}
    for name in dict.fromkeys([target, *names["source_path"], *names["entity_path"]]):
        try:
            files[name] = writer.refer(located(name, roots)[0])
        except SkippedSample as skipped:
            failures[name] = skipped
    if failures:
        raise _missing(failures, roots, where)
    return [_sample(fields, files[target], files, names, writer, roots)]


def _sample(
    fields: Mapping[str, Any],
    target: ImageFile,
    files: Mapping[str, ImageFile],
    names: Mapping[str, list[str]],
    writer: ImageWriter,
    roots: Mapping[str, str],
) -> dict[str, Any]:
    paths = {field: [files[name].path for name in names[field]] for field in ("entity_path", "source_path")}
    masks = [writer.relative(located(name, roots)[0]) for name in names["mask_path"]]
    size = {"width": target.width, "height": target.height}
    indexed = {"index_size": [fields.get("width"), fields.get("height")]}  # what bbox counts in
    extra = {"mask_path": masks, "bbox": fields.get("bbox"), "object": fields.get("object")} | indexed
    prompt = short_enough(required_text(fields["multi_prompt"], "instruction"))
    return {"image": target.path, **size, **paths, "multi_prompt": prompt, "task": Task.SUBJECT_EDIT, **extra}


def _paths(fields: Mapping[str, Any], name: str, where: str) -> list[str]:
    value = fields.get(name)
    if not isinstance(value, list | None) or not all(isinstance(one, str) and one for one in value or ()):
        raise SkippedSample(f"{name} holds no paths", f"{where}{type_name(value)}")
    return value or []


def _missing(failures: Mapping[str, SkippedSample], roots: Mapping[str, str], where: str) -> SkippedSample:
    """One outcome of all images of a row that cannot be had, counted by what is the matter and by their origins."""
    kinds = sorted({f"{skipped.reason} of {_origin(name, roots)}" for name, skipped in failures.items()})
    return SkippedSample(", ".join(kinds), where + "; ".join(f"{n}: {s.detail}" for n, s in failures.items()))


# ---- roots -----------------------------------------------------------------------------------------------------------


def located(name: str, roots: Mapping[str, str]) -> tuple[Path, str]:
    """Where the image of the index's path lies, and the root that covers it: the longest, by whole names.

    Raises SkippedSample for a path that no root covers, and for one that climbs out of its root.
    """
    old = max((old for old in roots if PurePosixPath(name).is_relative_to(old)), key=len, default=None)
    if old is None:
        raise SkippedSample("image below no --root", "give --root OLD=NEW with the beginning of this path as OLD")
    rest = PurePosixPath(name).relative_to(old)
    if ".." in rest.parts:
        raise SkippedSample("path with ..", f"{rest} may lie outside of {roots[old]}")
    return Path(roots[old], rest), old


def _origin(name: str, roots: Mapping[str, str]) -> str:
    try:
        return located(name, roots)[1]
    except SkippedSample:
        return str(PurePosixPath(*PurePosixPath(name).parent.parts[: ORIGIN_NAMES + name.startswith("/")]))


def parse_roots(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`OLD=NEW` each -> pairs, NEW absolute. Raises SourceError for another form, an OLD given twice, a missing NEW."""
    roots: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise SourceError(
                f"--root {text!r}: expected OLD=NEW, the beginning of the index's paths and a folder here"
            )
        old = str(PurePosixPath(old))
        if old in roots:
            raise SourceError(f"--root {text!r}: {old} is given twice; one folder must hold all of it")
        if not Path(new).is_dir():
            raise SourceError(f"--root {text!r}: {new} is no folder; correct it, or fetch the images first")
        roots[old] = str(Path(new).resolve())
    return tuple(roots.items())

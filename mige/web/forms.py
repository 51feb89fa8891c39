"""The form of a tab, filled again: from an earlier run, from a result PNG, from what a browser kept.

All but the first may be anything that anybody wrote: each value is read as if it had been sent (`fields`), and what is
no value of its field is left out of the form, or refused in a sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mige.tasks import Task
from mige.web.adapting import SCALES, Adapter
from mige.web.fields import number, read_text, show, whole
from mige.web.file_store import FileStore
from mige.web.instructions import MAX_CHARACTERS, RefusedError
from mige.web.request import GUIDANCE, MAX_AT_ONCE, SEEDS, SOURCE_GUIDANCE, STEPS, Request
from mige.web.strokes import as_lists, read_strokes

KEEP = object()
"""In place of a value: the field stays as it is."""


def of_request(request: Request, store: FileStore, slots: int, adapters: Sequence[Adapter]) -> list[Any]:
    """The values of an earlier run, in the order of a tab's components; images that were deleted since are None."""
    pictures = [path and store.find(str(path)) for path in request.pictures[:slots]]
    pictures += [None] * (slots - len(pictures))
    scales = [one.scale for one in adapters] if request.scales is None else request.scales
    return [
        request.instruction,
        *(None if path is None else str(path) for path in pictures),
        request.seeds[0],
        len(request.seeds),
        request.steps,
        request.guidance,
        request.source_guidance,
        request.width,
        request.height,
        request.negative,
        [] if isinstance(request.mask, Path) else as_lists(request.mask or ()),
        *scales,
    ]


def of_settings(
    settings: Mapping[str, Any], slots: Mapping[Task, int], adapters: Sequence[Adapter]
) -> tuple[Task, list[Any]]:
    """The task and the values of a result's settings (`provenance.read_settings`); its images are not in them.

    slots: images of each task's form. Raises RefusedError for a setting that this page has not, or out of its range.
    """
    task = settings.get("task")
    if task not in list(Task):
        raise RefusedError(f"The task in this file is {show(task)}: expected one of {', '.join(Task)}.")
    scales = settings.get("adapters")
    if not isinstance(scales, dict | None):
        raise RefusedError(f"The adapters in this file are {show(scales)}: expected a scale for each.")
    return Task(task), [
        _short(settings.get("instruction"), "instruction"),
        *[KEEP] * slots[task],
        whole("seed", settings.get("seed"), SEEDS),
        1,
        whole("number of steps", settings.get("steps"), STEPS),
        number("guidance", settings.get("guidance"), GUIDANCE),
        number("source guidance", settings.get("source_guidance"), SOURCE_GUIDANCE),
        whole("width", settings.get("width"), (0, 2**16)),
        whole("height", settings.get("height"), (0, 2**16)),
        _short(settings.get("negative"), "negative text"),
        as_lists(read_strokes(settings.get("mask"))),
        *(_scale(scales, one) for one in adapters),
    ]


def _scale(scales: Mapping[str, Any] | None, adapter: Adapter) -> Any:
    """What a file says of an adapter: 0 where it has others alone, nothing where it names none at all."""
    if scales is None:
        return KEEP
    return number(f"scale of {adapter.label}", scales.get(adapter.label, 0.0), SCALES)


def of_draft(values: Any, slots: int, store: FileStore, adapters: Sequence[Adapter]) -> list[Any]:
    """The values that a browser kept of a form, KEEP for each that is none of its field's; all of them for no list."""
    read: list[Callable[[Any], Any]] = [
        lambda value: _short(value, "instruction"),
        *[lambda value: _path(value, store)] * slots,
        lambda value: whole("seed", value, SEEDS),
        lambda value: whole("number of pictures", value, (1, MAX_AT_ONCE)),
        lambda value: whole("number of steps", value, STEPS),
        lambda value: number("guidance", value, GUIDANCE),
        lambda value: number("source guidance", value, SOURCE_GUIDANCE),
        lambda value: whole("width", value, (0, 2**16)),
        lambda value: whole("height", value, (0, 2**16)),
        lambda value: _short(value, "negative text"),
        lambda value: as_lists(read_strokes(value)),
        *[lambda value: number("scale", value, SCALES)] * len(adapters),
    ]
    if not isinstance(values, list) or len(values) != len(read):
        return [KEEP] * len(read)
    return [_or_keep(how, value) for how, value in zip(read, values, strict=True)]


def _or_keep(how: Callable[[Any], Any], value: Any) -> Any:
    try:
        return how(value)
    except RefusedError:
        return KEEP


def _short(value: Any, name: str) -> str:
    text = read_text(value, name)
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"The {name} has {len(text):,} characters: write at most {MAX_CHARACTERS:,}.")
    return text


def _path(value: Any, store: FileStore) -> str | None:
    """The path of an upload that is still there, sent as {"path": ...}; None for any other value."""
    found: Path | None = store.find(value.get("path")) if isinstance(value, dict) else None
    return None if found is None else str(found)

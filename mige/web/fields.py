"""The values of a tab's fields, as anybody may send them -> a `Request`, or a sentence that names the field.

Gradio's components hand their values on as they came (`components.raw`), so that page and API are checked here alike.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mige.tasks import Task
from mige.web.adapting import SCALES, Adapter
from mige.web.file_store import FileStore
from mige.web.instructions import RefusedError
from mige.web.request import GUIDANCE, MAX_AT_ONCE, SEEDS, SOURCE_GUIDANCE, STEPS, Request, check_range
from mige.web.strokes import read_strokes

NUM_SETTINGS = 9  # seed, how many, steps, guidance, source guidance, width, height, negative text, mask


def read_request(task: Task, values: Sequence[Any], store: FileStore, adapters: Sequence[Adapter] = ()) -> Request:
    """The request of a tab's values, in the order of its components: text, images, settings, a scale an adapter.

    Raises RefusedError for values of a wrong type, for images that were not uploaded here, and for numbers out of their
    range; what depends on the model is left to `GenerationService.check`.
    """
    end = len(values) - len(adapters)
    text, *uploads = values[: end - NUM_SETTINGS]
    seed, many, steps, guidance, source_guidance, width, height, negative, mask = values[end - NUM_SETTINGS : end]
    scales = [one.scale if value is None else number(f"scale of {one.label}", value, SCALES)
              for one, value in zip(adapters, values[end:], strict=True)]  # fmt: skip
    seed, many = whole("seed", seed, SEEDS), whole("number of pictures", many, (1, MAX_AT_ONCE))
    return Request(
        task,
        read_text(text),
        read_images(uploads, store),
        tuple(range(seed, seed + many)),
        whole("number of steps", steps, STEPS),
        number("guidance", guidance, GUIDANCE),
        number("source guidance", source_guidance, SOURCE_GUIDANCE),
        whole("width", width),
        whole("height", height),
        read_text(negative, "negative text").strip(),
        read_strokes(mask),
        tuple(scales),
    )


def read_text(value: Any, name: str = "instruction") -> str:
    """A text; nothing at all is as good as an empty one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RefusedError(f"The {name} is {show(value)}: expected a text.")
    return value


def read_images(values: Sequence[Any], store: FileStore) -> tuple[Path | None, ...]:
    """The files of images 1, 2, ..., None where there is none; `guard` has reduced them to {"path": ...}."""
    return tuple(_read_image(value, place, store) for place, value in enumerate(values, start=1))


def _read_image(value: Any, place: int, store: FileStore) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() != {"path"}:
        raise RefusedError(f"Picture {place} is {show(value)}: expected a file that was uploaded to this server.")
    found = store.find(value["path"])
    if found is None:  # one sentence for all there is and is not
        raise RefusedError(
            f"Picture {place} is no file that was uploaded to this server, or was deleted since: upload it again."
        )
    return found


def whole(name: str, value: Any, limits: tuple[int, int] | None = None) -> int:
    """A whole number within `limits`. JSON does not tell 4.0 from 4, but 0.5 is refused, never rounded."""
    expected = "a whole number" + (f" from {limits[0]} to {limits[1]}" if limits else " of px")
    if value is None:
        raise RefusedError(f"The {name} is empty: write {expected}.")
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_whole(value):
        raise RefusedError(f"The {name} is {show(value)}: expected {expected}.")
    if limits:
        check_range(name, value, limits)
    return int(value)


def number(name: str, value: Any, limits: tuple[float, float]) -> float:
    """A finite number within `limits`."""
    expected = f"a number from {limits[0]:g} to {limits[1]:g}"
    if value is None:
        raise RefusedError(f"The {name} is empty: write {expected}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RefusedError(f"The {name} is {show(value)}: expected {expected}.")
    check_range(name, value, limits)
    return float(value)


def show(value: Any) -> str:
    """A value of JSON as a message may quote it: short, of printable ASCII, and no HTML."""
    quoted = json.dumps(value)
    return (quoted if len(quoted) <= 40 else quoted[:37] + "...").replace("<", "(").replace(">", ")")


def _is_whole(value: int | float) -> bool:
    return isinstance(value, int) or (math.isfinite(value) and value.is_integer())

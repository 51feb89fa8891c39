"""The fields of a request to the endpoint, as OpenAI's client sends them -> a `Request`, or an error with its field.

In a form all values are texts, in JSON they have types: both are read alike, and nothing that is sent is passed over.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mige.tasks import MAX_REFERENCES, Task
from mige.web.api_prompt import read_prompt
from mige.web.fields import number, show, whole
from mige.web.instructions import RefusedError
from mige.web.service import GUIDANCE, MAX_AT_ONCE, SEEDS, SOURCE_GUIDANCE, STEPS, GenerationService, Request

OURS = ("prompt", "model", "n", "size", "response_format", "output_format", "seed", "steps", "task", "guidance",
        "source_guidance")  # fmt: skip
ONLY = {"response_format": "b64_json", "output_format": "png", "stream": False}  # what the endpoint can answer with
AUTO = ("background", "input_fidelity", "moderation", "quality", "style")  # OpenAI's own, of which we have one value
IGNORED = ("user",)  # of whom it is sent has no influence on an image
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)

T = TypeVar("T")


class ApiError(Exception):
    """A request that gets no image.

    Args:
        sentence: what is wrong and what to do.
        param: the field at fault. code: a word that programs can compare.
    """

    def __init__(self, sentence: str, status: int = 400, *, param: str | None = None, code: str | None = None):
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code


def read_request(service: GenerationService, fields: Mapping[str, Any], count: int, mask: bool, edits: bool) -> Request:
    """The request of some fields; its images are still to come.

    Args:
        fields: texts, or values of JSON. count: images that were sent with it; mask: whether one came with them.
        edits: whether it is for /v1/images/edits.

    Raises ApiError for any field that is unknown, of a wrong type or out of its range.
    """
    _check_names(fields)
    _check_model(fields.get("model"), service.name)
    task = _task(fields.get("task"), count, edits)
    if mask and task is Task.SUBJECT:
        raise ApiError("A mask says what of image 1 may change, but nothing is edited: leave it out.", param="mask")
    usual = service.defaults(task)

    def read(name: str, how: Callable[..., T], default: T, limits: tuple) -> T:
        value = fields.get(name)
        if value is None:
            return default
        with_blanks = name.replace("_", " ")
        return _named(name, how, {"n": "number of images", "steps": "number of steps"}.get(name, with_blanks),
                      _plain(value), limits)  # fmt: skip

    many = read("n", whole, 1, (1, MAX_AT_ONCE))
    seed = read("seed", whole, secrets.randbelow(2**31), SEEDS)
    width, height = _size(fields.get("size"), service.pipeline.sizes.native, task)
    prompt = _text("prompt", fields.get("prompt"))
    request = Request(
        task,
        prompt,
        (Path(),) * count,
        tuple(range(seed, seed + many)),
        read("steps", whole, usual.steps, STEPS),
        read("guidance", number, usual.guidance, GUIDANCE),
        read("source_guidance", number, usual.source_guidance, SOURCE_GUIDANCE),
        width,
        height,
        reading=_named("prompt", read_prompt, task, prompt, count),
    )
    service.check(request)
    return request


def _named(name: str, how: Callable[..., T], *values: Any) -> T:
    """What `how` reads, its refusal as one of a field."""
    try:
        return how(*values)
    except RefusedError as refusal:
        raise ApiError(str(refusal), param=name) from refusal


def _check_names(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in OURS or name in IGNORED or value is None:
            continue
        if name in AUTO:
            if value != "auto":
                raise ApiError(f"“{name}” is {show(value)}: this model has “auto” alone.", param=name)
        elif name not in ONLY:
            known = ", ".join(sorted({*OURS, *AUTO, *ONLY, *IGNORED}))
            raise ApiError(f"{name[:40]!a} is no field of this request: it takes {known}.", param=name[:40])
    for name, only in ONLY.items():
        value = fields.get(name)
        if value is not None and (value if isinstance(only, str) else _plain(value)) != only:
            raise ApiError(f"“{name}” is {show(value)}: this server has {json.dumps(only)} alone.", param=name)


def _check_model(model: Any, own: str) -> None:
    if model is not None and model != own:
        message = f"The model {show(model)} is not here: this server has {show(own)}, or leave “model” out."
        raise ApiError(message, 404, param="model", code="model_not_found")


def _task(value: Any, count: int, edits: bool) -> Task:
    """The task that is asked for, else that of so many images. Raises ApiError where it does not fit them."""
    if edits and count == 0:
        raise ApiError("There is no image: send one as a file named “image”.", param="image")
    if count > MAX_REFERENCES:
        raise ApiError(f"There are {count} images: the model reads at most {MAX_REFERENCES}.", param="image")
    by_count = {0: Task.SUBJECT, 1: Task.EDIT}.get(count, Task.SUBJECT_EDIT)
    task = by_count if value is None else value
    if task not in list(Task):
        raise ApiError(f"The task is {show(value)}: expected one of {', '.join(Task)}.", param="task")
    task = Task(task)
    if task not in (by_count, Task.SUBJECT):
        message = f"The task “{task}” does not fit {count} images: one is edited, with more the others are subjects."
        raise ApiError(message, param="task")
    return task


def _size(value: Any, native: int, task: Task) -> tuple[int, int]:
    """Width and height, px; 0 and 0 for "auto": an edit is as image 1, anything else has the native size."""
    if value is None or value == "auto":
        return (native, native) if task is Task.SUBJECT else (0, 0)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise ApiError(f"The size is {show(value)}: expected “auto”, or one as “{native}x{native}”.", param="size")
    return int(match[1]), int(match[2])


def _text(name: str, value: Any) -> str:
    if value is None:
        raise ApiError(f"“{name}” is missing: send a text.", param=name)
    if not isinstance(value, str):
        raise ApiError(f"“{name}” is {show(value)}: expected a text.", param=name)
    return value


def _plain(value: Any) -> Any:
    """A number or truth value that a form has as text; any other text stays what it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value

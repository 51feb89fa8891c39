"""The page's components: Gradio's, that hand on what they are sent, unread; and the parts of a tab made of them."""

from abc import ABCMeta
from dataclasses import dataclass
from typing import Any

import gradio as gr

from mige.tasks import MAX_REFERENCES, Task

_FILE = {"title": "ImageData", "type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}


def _variant(base: type, **changes: Any) -> type:
    """A component that differs in some members; a `class` statement would make Gradio write a stub beside this file."""
    return ABCMeta.__new__(type(base), base.__name__, (base,), {"__module__": __name__, **changes})


def raw(self: gr.Component, value: Any) -> Any:
    """What was sent, as it came: `fields` is the one place that reads it, for page and API alike."""
    return value


Textbox = _variant(gr.Textbox, preprocess=raw)
Number = _variant(gr.Number, preprocess=raw)
Slider = _variant(gr.Slider, preprocess=raw)
Upload = _variant(gr.Image, preprocess=raw, data_model=None, api_info=lambda self: _FILE)
Dataset = _variant(gr.Dataset, preprocess=raw)
# Of the page only: no value of the API.
Token = _variant(gr.Textbox, preprocess=raw, skip_api=True)
Stage = _variant(gr.HTML, skip_api=True)


@dataclass(frozen=True)
class Job:
    """What a tab is for, in a visitor's words."""

    task: Task
    title: str
    api_name: str
    slots: tuple[str, ...]  # what belongs into picture 1, 2, ...
    placeholder: str  # an instruction to begin from


JOBS = (
    Job(
        Task.SUBJECT,
        "Generate with my subject",
        "generate",
        ("Drop a subject, or click", *("Optional: one more subject",) * (MAX_REFERENCES - 1)),
        "a picture 1 next to a picture 2 on a beach",
    ),
    Job(Task.EDIT, "Edit a picture", "edit", ("Drop the picture to edit, or click",), "make it a snowy winter day"),
    Job(
        Task.SUBJECT_EDIT,
        "Edit with my subject",
        "edit_with_subject",
        (
            "Drop the picture to edit, or click",
            "Drop a subject, or click",
            *("Optional: one more subject",) * (MAX_REFERENCES - 2),
        ),
        "put picture 2 to the left of the cup in picture 1",
    ),
)


@dataclass
class Tab:
    """The components of one tab."""

    job: Job
    instruction: gr.Textbox
    pictures: list[gr.Image]
    reads: gr.HTML
    run: gr.Button
    stop: gr.Button
    settings: list[gr.Component]  # seed, how many, steps, guidance, source guidance, width, height
    examples: gr.Dataset
    stage: gr.HTML
    gallery: gr.Gallery
    token: gr.Textbox  # never visible: names the results that are shown
    slider: gr.ImageSlider | None  # of the tabs that edit
    download: gr.DownloadButton

    @property
    def asked(self) -> list[gr.Component]:
        """What a request is made of."""
        return [self.instruction, *self.pictures, *self.settings]

    @property
    def compared(self) -> list[gr.Component]:
        """What shows one image of a result."""
        return [part for part in (self.download, self.slider) if part is not None]

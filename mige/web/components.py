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
Scale = _variant(gr.Slider, preprocess=raw, skip_api=True)
Html = _variant(gr.HTML, preprocess=raw, skip_api=True)
Choice = _variant(gr.Radio, preprocess=raw, skip_api=True)
Tick = _variant(gr.Checkbox, preprocess=raw, skip_api=True)
File = _variant(gr.UploadButton, preprocess=raw, data_model=None, skip_api=True)


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
    random: gr.Checkbox  # a new seed at every run
    shape: gr.Radio
    settings: list[gr.Component]  # seed, how many, steps, guidance, source guidance, width, height, negative text, mask
    adapters: list[gr.Slider]
    examples: gr.Dataset
    results: "Results"

    @property
    def asked(self) -> list[gr.Component]:
        """What a request is made of."""
        return [self.instruction, *self.pictures, *self.settings, *self.adapters]

    @property
    def slots(self) -> list[gr.Image]:
        """The pictures that the model has room for."""
        return [picture for picture in self.pictures if picture.visible]


@dataclass
class Results:
    """What comes out of a tab."""

    stage: gr.HTML  # what happens now
    timer: gr.Timer  # looks for the place in the queue while a request waits
    gallery: gr.Gallery
    token: gr.Textbox  # never visible: names the results that are shown
    chosen: gr.Number  # never visible: which of them
    compare: gr.HTML  # of the tabs that edit: a result over its input
    download: gr.DownloadButton
    download_all: gr.DownloadButton
    as_source: gr.Button
    as_subject: gr.Button

    @property
    def shown(self) -> list[gr.Component]:
        """What shows one image of a result."""
        return [self.chosen, self.compare, self.download, self.as_source, self.as_subject]

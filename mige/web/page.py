"""The Gradio page: three tabs around a studio, each with the same flow.

Run: `begin` (checks, outside the queue) -> `make` (the queue's one place; its steps stream to the page) -> `show`.
Everything that is written lies in one temporary folder that goes when `serving` ends.
"""

import os
import tempfile
import time
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from mige.tasks import MOST_REFERENCES, Task
from mige.utils.images import save_image
from mige.web import examples, look
from mige.web.numbered import MOST_CHARACTERS, RefusedError
from mige.web.provenance import save_with_settings
from mige.web.studio import (
    GUIDANCE,
    MOST_AT_ONCE,
    SEEDS,
    SOURCE_GUIDANCE,
    STEPS,
    Made,
    Request,
    Step,
    Stopped,
    Studio,
)

EXAMPLE_DATA = Path(__file__).parents[2] / "example_data"  # of the checkout this runs from
UPLOAD_MB = 20
MOST_WAITING = 100  # requests in the queue; one more is told that it is full
KEPT_SECONDS = 2 * 3600  # uploads and results older than this are deleted
_SWEEP_SECONDS = 300


@dataclass(frozen=True)
class Job:
    """One tab: what a person wants, in their words."""

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
        ("Drop a subject",) * MOST_REFERENCES,
        "a picture 1 next to a picture 2 on a beach",
    ),
    Job(Task.EDIT, "Edit a picture", "edit", ("Drop the picture to edit",), "make it a snowy winter day"),
    Job(
        Task.SUBJECT_EDIT,
        "Edit with my subject",
        "edit_with_subject",
        ("Drop the picture to edit", *("Drop a subject",) * (MOST_REFERENCES - 1)),
        "put picture 2 to the left of the cup in picture 1",
    ),
)


# ---- components ------------------------------------------------------------------------------------------------------


def _path_of(self: gr.Image, upload: Any) -> str | None:
    """An upload as the path of its file, unopened: `images.open_image` is the door, not Gradio's own decoding."""
    if upload is not None and upload.path is None:
        raise gr.Error("Send the picture as a file, not within the request.", print_exception=False)
    return None if upload is None else upload.path


async def _keep(self: gr.Image, path: str | Path | None) -> str | None:
    """The file in Gradio's folder; nothing is fetched from an address that somebody sends."""
    if str(path).lower().startswith(("http:", "https:")):
        raise gr.Error("Send the picture itself, not its address.", print_exception=False)
    return await gr.Image.async_move_resource_to_block_cache(self, path)


def _variant(base: type, **changes: Any) -> type:
    """A component that differs in some methods; a `class` statement would make Gradio write a stub beside this file."""
    return ABCMeta.__new__(type(base), base.__name__, (base,), {"__module__": __name__, **changes})


Upload = _variant(gr.Image, preprocess=_path_of, async_move_resource_to_block_cache=_keep)
Hidden = _variant(Upload, skip_api=True)  # of the page only: no result of the API
Stage = _variant(gr.HTML, skip_api=True)


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
    stage: gr.HTML
    gallery: gr.Gallery
    before: gr.Image  # never visible: the edited picture as the model saw it, for the slider
    slider: gr.ImageSlider | None  # of the tabs that edit
    download: gr.DownloadButton

    @property
    def shown(self) -> list[gr.Component]:
        """What appears with a result."""
        return [part for part in (self.gallery, self.download, self.slider) if part is not None]


@contextmanager
def serving(studio: Studio, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page while the context lasts, and yield its address; stops the studio in the end.

    Args:
        port: None for the first free one from 7860. Raises OSError if it is taken.
    """
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    with tempfile.TemporaryDirectory(prefix="mige-web-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        page = build(studio, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                max_file_size=f"{UPLOAD_MB}mb",
                footer_links=["api"],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                theme=look.THEME,
                css=look.CSS,
            )
            yield address
        finally:
            studio.close()
            page.close()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """The page over a studio; examples and results are written below `folder`, Gradio's temporary one."""
    model = studio.pipeline
    machine = f"{str(model.transformer.dtype).removeprefix('torch.')} on {_device_name(model.device)}"
    with gr.Blocks(title="MIGE", analytics_enabled=False, delete_cache=(_SWEEP_SECONDS, KEPT_SECONDS)) as page:
        gr.HTML(look.header(studio.name, model.native_size, machine, studio.is_miniature))
        with gr.Tabs():
            for job in JOBS:
                with gr.Tab(job.title):
                    _connect(_lay_out(studio, job, folder), studio, folder)
    return page.queue(max_size=MOST_WAITING)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


# ---- layout ----------------------------------------------------------------------------------------------------------


def _lay_out(studio: Studio, job: Job, folder: Path) -> Tab:
    """The components of one tab: what goes in on the left, what comes out on the right."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            with gr.Row(elem_classes="mige-slots"):
                pictures = [_slot(n, words, n <= studio.capacity) for n, words in enumerate(job.slots, start=1)]
            instruction = gr.Textbox(
                label="Instruction",
                placeholder=job.placeholder,
                lines=2,
                max_lines=6,
                max_length=MOST_CHARACTERS,
                autofocus=job is JOBS[0],
            )
            reads = gr.HTML(look.NOTHING_READ)
            with gr.Row():
                run = gr.Button("Run", variant="primary", elem_classes="mige-run")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_classes="mige-stop")
            settings = _settings(studio, job.task)
        with gr.Column(scale=5, min_width=320):
            stage = Stage(look.EMPTY_STAGE, elem_classes="mige-result")
            slider = None
            if job.task is not Task.SUBJECT:
                slider = gr.ImageSlider(
                    label="Before and after", visible=False, interactive=False, max_height=640, buttons=["fullscreen"]
                )
            gallery = gr.Gallery(
                label="Results", visible=False, interactive=False, columns=2, object_fit="contain", height="auto",
                buttons=["fullscreen"], elem_classes="mige-gallery",
            )  # fmt: skip
            download = gr.DownloadButton("Download PNG", visible=False)
            before = Hidden(visible=False, format="png")
    _offer_examples(studio, job, folder, [instruction, *pictures])
    return Tab(job, instruction, pictures, reads, run, stop, settings, stage, gallery, before, slider, download)


def _slot(number: int, words: str, visible: bool) -> gr.Image:
    return Upload(
        label=f"Picture {number}",
        placeholder=words,
        sources=["upload"],
        height=180,
        min_width=100,
        buttons=[],
        visible=visible,
        elem_classes="mige-slot",
    )


def _settings(studio: Studio, task: Task) -> list[gr.Component]:
    offered, (smallest, largest, grid) = studio.defaults(task), studio.sides
    native = studio.pipeline.native_size
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=SEEDS[0], maximum=SEEDS[1], min_width=140)
        many = gr.Slider(1, MOST_AT_ONCE, 1, step=1, label="Pictures", min_width=160)
    with gr.Accordion("Size, steps, guidance", open=False):
        with gr.Row():
            width = gr.Slider(smallest, largest, native, step=grid, label="Width, px", min_width=160)
            height = gr.Slider(smallest, largest, native, step=grid, label="Height, px", min_width=160)
        steps = gr.Slider(*STEPS, offered.steps, step=1, label="Steps")
        with gr.Row():
            guidance = gr.Slider(*GUIDANCE, offered.guidance, step=0.1, label="Guidance", min_width=160)
            source_guidance = gr.Slider(
                *SOURCE_GUIDANCE, offered.source_guidance, step=0.1, label="Source guidance", min_width=160,
                visible=task is not Task.SUBJECT,
            )  # fmt: skip
    return [seed, many, steps, guidance, source_guidance, width, height]


def _offer_examples(studio: Studio, job: Job, folder: Path, inputs: list[gr.Component]) -> None:
    if studio.is_miniature:
        offered = examples.of_the_world(job.task, folder)
    else:
        offered = examples.of_records(job.task, EXAMPLE_DATA)
    empty = [None] * (len(inputs) - 1)
    rows = [[one.instruction, *map(str, one.pictures), *empty][: len(inputs)] for one in offered]
    gr.Examples(rows, inputs, label="Examples: click one, then Run", api_visibility="private")


# ---- events ----------------------------------------------------------------------------------------------------------


def _connect(tab: Tab, studio: Studio, folder: Path) -> None:
    """What happens in a tab, from typing to the result."""
    asked = [tab.instruction, *tab.pictures]
    quiet = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    gr.on(
        [tab.instruction.change, *(picture.change for picture in tab.pictures)],
        lambda text, *paths: _read_aloud(studio, tab.job.task, text, paths),
        asked, tab.reads, trigger_mode="always_last", **quiet,
    )  # fmt: skip
    buttons = [tab.run, tab.stop]
    make = _maker(studio, tab.job, folder)
    begun = gr.on(
        [tab.run.click, tab.instruction.submit],
        lambda *values: _begin(studio, tab, _request(tab.job.task, values)),
        asked + tab.settings, [*buttons, tab.stage, *tab.shown], concurrency_limit=None,
        **(quiet | {"queue": True}),  # only of queued events does the page show errors
    )  # fmt: skip
    made = begun.success(
        make, asked + tab.settings, [tab.gallery, tab.before, tab.stage], show_progress_on=tab.stage,
        scroll_to_output=True, api_name=tab.job.api_name, concurrency_limit=1, concurrency_id="model",
    )  # fmt: skip
    made.success(lambda *result: [*_ready(), *_show(*result)], [tab.gallery, tab.before], buttons + tab.shown, **quiet)
    made.failure(lambda: [*_ready(), look.NOTHING_MADE], None, [*buttons, tab.stage], **quiet)
    tab.stop.click(lambda: [*_ready(), look.NOTHING_MADE], None, [*buttons, tab.stage], cancels=[made], **quiet)
    tab.gallery.select(_pick, [tab.gallery, tab.before], tab.shown, **quiet)


def _read_aloud(studio: Studio, task: Task, text: str, paths: Sequence[str | None]) -> str:
    """What the model is given, or why it can't be read yet; nothing while nothing is written."""
    if not text.strip():
        return look.NOTHING_READ
    try:
        reading, full, odd = studio.explain(task, text, [path is not None for path in paths])
    except RefusedError as refusal:
        return look.wrong(str(refusal))
    named = {number: Path(paths[number - 1]) for number in reading.numbers}
    return look.instruction(task, full, reading.numbers, named, odd)


def _begin(studio: Studio, tab: Tab, request: Request) -> list[Any]:
    """Refuse at once what cannot run; else clear the stage."""
    with _as_messages():
        studio.check(request)
    hidden = [gr.update(visible=False) for _ in tab.shown]
    return [gr.update(visible=False), gr.update(visible=True), look.WAITING, *hidden]


def _ready() -> tuple[Any, Any]:
    """The buttons when nothing runs."""
    return gr.update(visible=True), gr.update(visible=False)


def _maker(studio: Studio, job: Job, folder: Path) -> Callable[..., Iterator]:
    """The function behind the API's endpoint of a tab; the names of its parameters are the API's."""
    if job.task is Task.EDIT:

        def edit(instruction, picture_1, seed, pictures, steps, guidance, source_guidance, width, height):
            """Edit picture 1 as the instruction says; a list of PNG files, one a seed."""
            values = instruction, picture_1, seed, pictures, steps, guidance, source_guidance, width, height
            yield from _make(studio, job, folder, values)

        return edit

    def with_subjects(
        instruction,
        picture_1,
        picture_2=None,
        picture_3=None,
        picture_4=None,
        seed=None,
        pictures=None,
        steps=None,
        guidance=None,
        source_guidance=None,
        width=None,
        height=None,
    ):  # fmt: skip - what a client leaves out has the page's value, never None
        """Make what the instruction says, which names the pictures by number; a list of PNG files, one a seed."""
        named = instruction, picture_1, picture_2, picture_3, picture_4
        yield from _make(studio, job, folder, (*named, seed, pictures, steps, guidance, source_guidance, width, height))

    return with_subjects


def _request(task: Task, values: Sequence[Any]) -> Request:
    """The values of a tab's components, in their order, as a request."""
    text, *paths = values[:-7]
    seed, many, steps, guidance, source_guidance, width, height = values[-7:]
    if seed is None:
        raise gr.Error("The seed is empty: write a number.", print_exception=False)
    return Request(
        task,
        text,
        tuple(None if path is None else Path(path) for path in paths),
        tuple(range(seed, seed + int(many))),
        int(steps),
        guidance,
        source_guidance,
        int(width),
        int(height),
    )


def _make(studio: Studio, job: Job, folder: Path, values: Sequence[Any]) -> Iterator[tuple[Any, Any, str]]:
    """Run a request; yields gallery, before and stage after every step and at the end."""
    with _as_messages():
        started, previews = time.perf_counter(), []
        for event in studio.run(_request(job.task, values)):
            if isinstance(event, Step):
                if event.previews:
                    previews = [look.preview(image) for image in event.previews]
                yield gr.skip(), gr.skip(), look.progress(event, time.perf_counter() - started, previews)
            else:
                yield *_save(event, job, folder), look.done(len(event.pictures), event.seconds)


def _save(made: Made, job: Job, folder: Path) -> tuple[list[tuple[str, str]], str | None]:
    """Results as PNG files with their settings, (path, caption), and the edited picture as one.

    In a folder of their own: Gradio would write the same picture of two requests over itself while it is fetched.
    """
    below = Path(tempfile.mkdtemp(dir=folder))
    saved, before = [], None
    for picture, settings in zip(made.pictures, made.settings, strict=True):
        path = below / f"mige-{job.api_name}-seed-{settings['seed']}.png"
        save_with_settings(picture, path, settings)
        saved.append((str(path), f"seed {settings['seed']}"))
    if made.before is not None:
        before = str(below / "before.png")
        save_image(made.before, Path(before))
    return saved, before


def _show(results: list[tuple[str, str]], before: str | None) -> list[Any]:
    """The result: beside its input where there is one, and as a grid where there are several."""
    gallery = gr.update(visible=before is None or len(results) > 1, selected_index=None)
    return [gallery, *_chosen(results, before, 0)]


def _pick(results: list[tuple[str, str]], before: str | None, event: gr.SelectData) -> list[Any]:
    """The picture of the grid that was clicked: to compare and to download."""
    return [gr.skip(), *_chosen(results, before, event.index)]


def _chosen(results: list[tuple[str, str]], before: str | None, index: int) -> list[Any]:
    path, caption = results[index]
    download = gr.update(value=path, visible=True, label=f"Download PNG of {caption}")
    return [download] + ([] if before is None else [gr.update(value=(before, path), visible=True)])


@contextmanager
def _as_messages() -> Iterator[None]:
    """Errors as what the page and the API show: a refusal in its own words, a fault of ours without its details."""
    try:
        yield
    except RefusedError as refusal:
        raise gr.Error(str(refusal), title="This cannot run", print_exception=False) from refusal
    except torch.OutOfMemoryError as error:
        raise gr.Error(
            "The model ran out of memory: ask for fewer pictures at once, a smaller size, or name fewer pictures.",
            title="This cannot run",
        ) from error
    except Stopped as stopped:
        raise gr.Error("The server is closing.", title="Stopped", print_exception=False) from stopped
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error("Something went wrong at our end: the log of the server says what.") from error

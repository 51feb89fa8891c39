"""How a tab is laid out: what goes in on the left, what comes out on the right."""

import gradio as gr

from mige.tasks import Task
from mige.web import theme
from mige.web.components import (
    JOBS,
    Dataset,
    Job,
    Number,
    Slider,
    Stage,
    Tab,
    Textbox,
    Token,
    Upload,
)
from mige.web.examples import Example
from mige.web.instructions import MAX_CHARACTERS
from mige.web.service import GUIDANCE, MAX_AT_ONCE, SEEDS, SOURCE_GUIDANCE, STEPS, GenerationService


def lay_out(service: GenerationService, job: Job, examples: list[Example]) -> Tab:
    """The components of one tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            with gr.Row(elem_classes="mige-slots"):
                pictures = [_slot(n, words, n <= service.capacity) for n, words in enumerate(job.slots, start=1)]
            instruction = Textbox(
                label="Instruction",
                placeholder=job.placeholder,
                lines=2,
                max_lines=6,
                max_length=MAX_CHARACTERS,
                autofocus=job is JOBS[0],
                info="Shift+Enter runs it.",
            )
            reads = gr.HTML(theme.NOTHING_READ)
            with gr.Row():
                run = gr.Button("Run", variant="primary", elem_classes="mige-run")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_classes="mige-stop")
            settings = _settings(service, job.task)
        with gr.Column(scale=5, min_width=320, elem_classes="mige-output"):
            stage = Stage(theme.EMPTY_STAGE, elem_classes="mige-result")
            slider = _slider() if job.task is not Task.SUBJECT else None
            gallery = gr.Gallery(
                label="Results", visible=False, interactive=False, columns=2, object_fit="contain", height="auto",
                buttons=["fullscreen"], elem_classes="mige-gallery",
            )  # fmt: skip
            download = gr.DownloadButton("Download PNG", visible=False)
            token = Token(visible=False)
    offered = _examples(examples, [instruction, *pictures])
    return Tab(job, instruction, pictures, reads, run, stop, settings, offered, stage, gallery, token, slider, download)


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


def _slider() -> gr.ImageSlider:
    """Open near the input's edge: what is seen first is the result, with a rim of the input that says "drag me"."""
    return gr.ImageSlider(
        label="Before and after (left: before, right: after)",
        visible=False,
        interactive=False,
        max_height=640,
        slider_position=8,
        buttons=["fullscreen"],
        elem_classes="mige-compare",
    )


def _settings(service: GenerationService, task: Task) -> list[gr.Component]:
    offered, (smallest, largest, grid) = service.defaults(task), service.sides
    native = service.pipeline.native_size
    with gr.Row():
        seed = Number(0, label="Seed", precision=0, minimum=SEEDS[0], maximum=SEEDS[1], min_width=140)
        many = Slider(1, MAX_AT_ONCE, 1, step=1, label="Pictures", min_width=160)
    with gr.Accordion("Size, steps, guidance", open=False):
        with gr.Row():
            if task is Task.SUBJECT:
                width = Slider(smallest, largest, native, step=grid, label="Width, px", min_width=200)
                height = Slider(smallest, largest, native, step=grid, label="Height, px", min_width=200)
            else:
                width = Slider(0, largest, 0, step=grid, label="Width, px (both 0: as picture 1)", min_width=200)
                height = Slider(0, largest, 0, step=grid, label="Height, px", min_width=200)
        steps = Slider(*STEPS, offered.steps, step=1, label="Steps")
        with gr.Row():
            guidance = Slider(*GUIDANCE, offered.guidance, step=0.1, label="Guidance", min_width=200)
            source_guidance = Slider(
                *SOURCE_GUIDANCE, offered.source_guidance, step=0.1, label="Source guidance", min_width=200,
                visible=task is not Task.SUBJECT,
            )  # fmt: skip
    return [seed, many, steps, guidance, source_guidance, width, height]


def _examples(examples: list[Example], inputs: list[gr.Component]) -> gr.Dataset:
    columns = 1 + max(
        (len(example.pictures) for example in examples), default=0
    )  # no column for a slot that none of them fills
    rows = [values_of(example, columns) for example in examples]
    return Dataset(components=inputs[:columns], samples=rows, label="Examples: click one, then Run", type="index")


def values_of(example: Example, num_inputs: int) -> list[str | None]:
    """The values that an example puts into the instruction and the slots; only as many as there are."""
    row = [example.instruction, *map(str, example.pictures)]
    return (row + [None] * num_inputs)[:num_inputs]

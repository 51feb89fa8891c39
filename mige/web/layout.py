"""How a tab is laid out: what goes in on the left, what comes out on the right."""

import json

import gradio as gr

from mige.inference.shapes import closest
from mige.tasks import Task
from mige.web import theme
from mige.web.adapting import SCALES
from mige.web.components import (
    JOBS,
    Choice,
    Dataset,
    File,
    Html,
    Job,
    Number,
    Results,
    Scale,
    Slider,
    Tab,
    Textbox,
    Tick,
    Token,
    Upload,
)
from mige.web.examples import Example
from mige.web.instructions import MAX_CHARACTERS
from mige.web.request import GUIDANCE, MAX_AT_ONCE, SEEDS, SOURCE_GUIDANCE, STEPS
from mige.web.service import GenerationService

WAIT_SECONDS = 2.0  # between two looks at the place in the queue
ENTRY = """element.addEventListener("click", (event) => {
  const token = event.target.closest("button")?.dataset.token;
  if (token) trigger("click", {token});
});"""  # which run of the history
SOURCE_SHAPE = "As picture 1"
SHAPES = ("1:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")


def lay_out(service: GenerationService, job: Job, examples: list[Example]) -> Tab:
    """The components of one tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            with gr.Row(elem_classes="mige-slots"):
                pictures = [_slot(n, words, n <= service.capacity) for n, words in enumerate(job.slots, start=1)]
            mask = _mask(job.task)
            instruction = Textbox(
                label="Instruction",
                placeholder=job.placeholder,
                lines=2,
                max_lines=6,
                max_length=MAX_CHARACTERS,
                autofocus=job is JOBS[0],
                info="Ctrl+Enter runs it, Escape stops it.",
            )
            reads = gr.HTML(theme.NOTHING_READ)
            with gr.Row():
                run = gr.Button("Run", variant="primary", elem_classes="mige-run")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_classes="mige-stop")
            random, shape, settings, adapters = _settings(service, job.task, mask)
            offered = _examples(examples, [instruction, *pictures])
        with gr.Column(scale=5, min_width=320, elem_classes="mige-output"):
            results = _results(job)
    return Tab(job, instruction, pictures, reads, run, stop, random, shape, settings, adapters, offered, results)


def lay_out_history() -> tuple[gr.Textbox, gr.HTML, gr.UploadButton]:
    """Below the tabs: who is there (never visible), what they made, and where a result PNG gives its settings back."""
    visitor = Token(visible=False)
    with gr.Row(elem_classes="mige-history-head"):
        gr.HTML("<h2>History</h2>", min_width=120)
        restore = File(
            "Drop a result PNG here for its settings, or click", file_types=[".png"], size="sm", min_width=240,
            scale=0, elem_classes="mige-restore",
        )  # fmt: skip
    restore.data_model = None  # its own, set for each one, refuses what the guard makes of a file
    return visitor, Html(theme.NO_HISTORY, js_on_load=ENTRY, elem_classes="mige-history"), restore


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


def _mask(task: Task) -> gr.HTML:
    """What is painted over picture 1; never visible where nothing is edited."""
    if task is Task.SUBJECT:
        return Html(None, visible=False)
    with gr.Accordion("Change only a part of picture 1 (mask)", open=False, elem_classes="mige-mask-part"):
        return Html(
            [],
            html_template=theme.MASK,
            js_on_load="window.mige.mask(element, props, watch);",
            elem_classes="mige-mask",
        )


def _results(job: Job) -> Results:
    stage = Html(theme.EMPTY_STAGE, elem_classes="mige-result")
    compare = Html("", visible=False, elem_classes="mige-comparison")
    gallery = gr.Gallery(
        label="Results", visible=False, interactive=False, columns=2, object_fit="contain", height="auto",
        buttons=["fullscreen"], elem_classes="mige-gallery",
    )  # fmt: skip
    with gr.Row(elem_classes="mige-actions"):
        download = gr.DownloadButton("Download PNG", visible=False, min_width=180)
        download_all = gr.DownloadButton("Download all", visible=False, min_width=180)
        as_source = gr.Button("Use as picture 1", visible=False, min_width=180)
        as_subject = gr.Button("Use as subject", visible=False, min_width=180)
    return Results(
        stage, gr.Timer(WAIT_SECONDS, active=False), gallery, Token(visible=False), Number(0, visible=False), compare,
        download, download_all, as_source, as_subject,
    )  # fmt: skip


def _settings(
    service: GenerationService, task: Task, mask: gr.HTML
) -> tuple[gr.Checkbox, gr.Radio, list[gr.Component], list[gr.Slider]]:
    offered, (smallest, largest, grid) = service.defaults(task), service.sides
    native, follows = service.pipeline.native_size, task is not Task.SUBJECT
    with gr.Row(elem_classes="mige-seed"):
        seed = Number(0, label="Seed", precision=0, minimum=SEEDS[0], maximum=SEEDS[1], min_width=140)
        random = Tick(True, label="New seed at every run", min_width=140, container=False)
        many = Slider(1, MAX_AT_ONCE, 1, step=1, label="Pictures", min_width=160)
    with gr.Accordion("Size, steps, guidance", open=False):
        shapes = [SOURCE_SHAPE] * follows + list(SHAPES)
        cut = "Any other shape than picture 1's cuts off what does not fit." if follows else None
        shape = Choice(shapes, value=shapes[0], label="Shape", info=cut, elem_classes="mige-shapes")
        least, side, of_both = (0, 0, ", px (both 0: as picture 1)") if follows else (smallest, native, ", px")
        with gr.Row():
            width = Slider(least, largest, side, step=grid, label=f"Width{of_both}", min_width=200)
            height = Slider(least, largest, side, step=grid, label="Height, px", min_width=200)
        steps = Slider(*STEPS, offered.steps, step=1, label="Steps")
        with gr.Row():
            guidance = Slider(*GUIDANCE, offered.guidance, step=0.1, label="Guidance", min_width=200)
            source_guidance = Slider(
                *SOURCE_GUIDANCE, offered.source_guidance, step=0.1, label="Source guidance", min_width=200,
                visible=follows,
            )  # fmt: skip
        negative = Textbox(
            "",
            label="Negative text",
            placeholder="blurry, text",
            info="What the picture should have nothing of. The model was trained without such texts.",
            max_length=MAX_CHARACTERS,
        )
        adapters = [
            Scale(*SCALES, one.scale, step=0.05, label=f"Adapter {one.label}, scale (0: off)")
            for one in service.adapters.offered
        ]
    sides = json.dumps({SOURCE_SHAPE: (0, 0)} | {one: _sides(service, one) for one in SHAPES})
    shape.input(None, shape, [width, height], js=f"(chosen) => ({sides})[chosen]", api_visibility="private")
    return random, shape, [seed, many, steps, guidance, source_guidance, width, height, negative, mask], adapters


def _sides(service: GenerationService, shape: str) -> tuple[int, int]:
    """Width and height of a shape such as "3:2", px: about the model's own area, within the sizes on offer."""
    smallest, largest, _ = service.sides
    height, width = closest(service.pipeline.sizes, *map(int, shape.split(":")))
    return min(max(width, smallest), largest), min(max(height, smallest), largest)


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

"""The generation service: requests of people -> images, one at a time, with previews on the way. It knows no page.

    service = GenerationService(pipeline, "mige-mini")
    for event in service.run(Request(Task.EDIT, "make picture 1 snowy", (Path("photo.jpg"),), seeds=(0, 1), ...)):
        ...  # Step, Step, ..., Made

Closing that generator, or `service.close()`, stops the work at its next step.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from PIL import Image
from torch import Tensor

from mige.data.checks import check_lengths
from mige.data.records import Record
from mige.data.synthetic.scenes import SIDE
from mige.diffusion.settings import WORLD, resolve
from mige.diffusion.solver import OnStep
from mige.inference.compositing import fit_source
from mige.inference.pipeline import MIGEPipeline
from mige.inference.shapes import Shape, SizeWish
from mige.models.instruction import MAX_WORDS, full_text
from mige.tasks import MAX_REFERENCES, Task
from mige.utils import images
from mige.utils.masks import open_mask
from mige.web.instructions import Reading, RefusedError, read

STEPS = (1, 100)
GUIDANCE = (0.0, 20.0)
SOURCE_GUIDANCE = (0.0, 10.0)
SEEDS = (0, 2**32 - 1)
MAX_AT_ONCE = 8  # pictures of one request, made together
MAX_IMAGE_PIXELS = 65_000_000  # of an upload: a photograph of 64 megapixels passes
PREVIEWS = 6  # of a run; each decodes the estimates of all its pictures


@dataclass(frozen=True)
class Request:
    """What one person asks for; `GenerationService.run` checks it."""

    task: Task
    instruction: str  # with "picture 1" where a picture belongs
    pictures: tuple[Path | None, ...]  # picture 1, 2, ...; the first is the one to edit, in the two tasks that edit
    seeds: tuple[int, ...]  # a picture each
    steps: int
    guidance: float
    source_guidance: float
    width: int  # px; 0, and the height too: an edit is as its source, anything else has the native size
    height: int
    mask: Path | None = None  # of picture 1: what may change
    reading: Reading | None = None  # of an instruction that was read already, by other rules than the page's


@dataclass(frozen=True)
class Defaults:
    """What the page offers before anyone touches it."""

    steps: int
    guidance: float
    source_guidance: float


@dataclass(frozen=True)
class Step:
    """A finished step of the sampler; now and then with what the pictures would be, at the size of the result."""

    number: int  # 1 .. of
    of: int
    previews: list[Image.Image] | None


@dataclass(frozen=True)
class Made:
    """The result: a picture a seed, what each was made with, and the edited picture as the model saw it (or None)."""

    pictures: list[Image.Image]
    settings: list[dict[str, Any]]
    before: Image.Image | None
    seconds: float


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """The work was stopped before it was finished."""


class GenerationService:
    """One model and the one thread that works with it: requests wait for each other, in the order they come."""

    def __init__(self, pipeline: MIGEPipeline, name: str):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.name = pipeline, name
        self._worker = ThreadPoolExecutor(1, "generation")  # one for good: each new thread would get OpenMP threads too
        self._closed = threading.Event()

    @property
    def is_miniature(self) -> bool:
        """Whether the model knows the drawn world only: one whose pictures are no larger than that world's."""
        return self.pipeline.native_size <= SIDE

    def defaults(self, task: Task) -> Defaults:
        """A few-step student's own; else the official settings of a task, of a miniature model the mini-bench's."""
        how = resolve(self.pipeline.scheduler.config, task, usual=WORLD if self.is_miniature else None)
        return Defaults(how.steps, how.guidance, how.source_guidance)

    @property
    def sides(self) -> tuple[int, int, int]:
        """Smallest and largest side of a result and the step between sizes, px: half to twice the native size."""
        grid, native = self.pipeline.sizes.step, self.pipeline.sizes.native
        return max(grid, native // 2 // grid * grid), 2 * native, grid

    @property
    def capacity(self) -> int:
        """Most pictures that an instruction has room for."""
        return min(MAX_REFERENCES, self.pipeline.fusion.config.max_tokens // self.pipeline.fusion.config.num_queries)

    def explain(self, task: Task, text: str, given: Sequence[bool]) -> tuple[Reading, str, list[str]]:
        """How the model reads a numbered instruction: the reading, the whole text it is given, and what is odd.

        Raises RefusedError as `instructions.read`, and for an instruction too long for its pictures.
        """
        reading = read(task, text, given)
        return reading, full_text(task, reading.prompt), self._oddities(task, reading)

    def _oddities(self, task: Task, reading: Reading) -> list[str]:
        """What is odd about a reading; raises RefusedError for one too long for its pictures."""
        named = tuple(Path(str(number)) for number in reading.numbers)
        record = Record("request", task, reading.prompt, named, None, None, None, "request")
        fusion = self.pipeline.fusion.config
        issues = check_lengths([record], self.pipeline.tokenizer, fusion.num_queries, fusion.max_tokens)
        if any(issue.fatal for issue in issues):
            raise RefusedError(
                f"The instruction is too long: a picture in it would not be read. The model takes {MAX_WORDS} words "
                f"and {fusion.max_tokens} tokens, of which each picture takes {fusion.num_queries}: use fewer."
            )
        return [issue.message for issue in issues]

    def check(self, request: Request) -> Reading:
        """The reading of a request that can run; raises RefusedError for any that cannot. Pictures are opened later."""
        smallest, largest, grid = self.sides
        for name, side in (("width", request.width), ("height", request.height)):
            if request.width == request.height == 0:  # as the source
                continue
            if not smallest <= side <= largest or side % grid:
                raise RefusedError(
                    f"The {name} is {side} px: choose a multiple of {grid} px from {smallest} to {largest} px."
                )
        check_range("number of steps", request.steps, STEPS)
        check_range("guidance", request.guidance, GUIDANCE)
        check_range("source guidance", request.source_guidance, SOURCE_GUIDANCE)
        check_range("number of pictures", len(request.seeds), (1, MAX_AT_ONCE))
        try:
            given = request.steps, request.guidance, request.source_guidance
            resolve(self.pipeline.scheduler.config, request.task, *given)
        except ValueError as error:
            raise RefusedError(f"{error}.") from error
        for seed in request.seeds:
            check_range("seed", seed, SEEDS)
        if request.reading is None:
            return self.explain(request.task, request.instruction, [path is not None for path in request.pictures])[0]
        self._oddities(request.task, request.reading)
        return request.reading

    def run(
        self, request: Request, stop: threading.Event | None = None, *, previews: bool = True
    ) -> Iterator[Step | Made]:
        """Make the pictures of a request; yields its steps, then the result.

        Args:
            stop: set it, from any thread, to stop the work at its next step, or before it begins.
            previews: whether some of the steps come with what the pictures would be.

        Raises RefusedError for what `check` refuses and for unusable pictures, Stopped if the service closes,
        and whatever goes wrong at work.
        """
        reading = self.check(request)
        if self._closed.is_set():
            raise Stopped
        events: SimpleQueue[Step | None] = SimpleQueue()
        stop = stop or threading.Event()
        on_step = self._watch(request.steps, events, stop, PREVIEWS if previews else 0)
        job = self._worker.submit(self._make, request, reading, on_step, stop)
        job.add_done_callback(lambda _: events.put(None))
        try:
            yield from iter(events.get, None)
            yield job.result()
        finally:
            stop.set()

    def close(self) -> None:
        """Stop what runs at its next step, and everything that waits."""
        self._closed.set()
        self._worker.shutdown(cancel_futures=True)

    def _make(self, request: Request, reading: Reading, on_step: OnStep, stop: threading.Event) -> Made:
        """The work itself, in the worker's thread."""
        if stop.is_set():  # while it waited
            raise Stopped
        started = time.perf_counter()
        opened = {number: _open(request.pictures[number - 1], number) for number in sorted(set(reading.numbers))}
        references = [opened[number] for number in reading.numbers]
        source = None if request.task is Task.SUBJECT else opened[1]
        many = len(request.seeds)
        try:
            shape = self._shape(request, source)
            before = source and fit_source(source, shape.whole, *shape.size)
            pictures = self.pipeline(
                [reading.prompt] * many,
                [references] * many,
                source and [source] * many,
                height=request.height or None,
                width=request.width or None,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                source_guidance_scale=request.source_guidance,
                seed=request.seeds,
                mask=request.mask and _open_mask(request.mask, source),
                on_step=on_step,
            ).images
        except images.BadImageError as error:  # one so long that scaling it would need too much memory
            raise RefusedError(f"A {error.args[0]} has {error.message}: {error.hint}.") from error
        settings = [self._settings(request, reading, seed) for seed in request.seeds]
        return Made(pictures, settings, before, time.perf_counter() - started)

    def _watch(self, steps: int, events: SimpleQueue, stop: threading.Event, previews: int) -> OnStep:
        """What happens after every step: stop if asked to, else report, now and then with previews."""
        every = -(-steps // previews) if previews else steps

        def on_step(step: int, x: Tensor, x0: Tensor) -> None:
            if stop.is_set() or self._closed.is_set():
                raise Stopped
            due = (step + 1) % every == 0 and step + 1 < steps
            events.put(Step(step + 1, steps, images.to_pil(self.pipeline.decode(x0)) if due else None))

        return on_step

    def _shape(self, request: Request, source: Image.Image | None) -> Shape:
        """The size of the pictures of a request."""
        wish = SizeWish(height=request.height or None, width=request.width or None)
        return wish.of_task(self.pipeline.sizes, request.task, source and source.size)

    def _settings(self, request: Request, reading: Reading, seed: int) -> dict[str, Any]:
        return {
            "task": str(request.task),
            "instruction": request.instruction,
            "prompt": reading.prompt,
            "pictures": list(reading.numbers),  # the number of the picture at each placeholder
            "model": self.name,
            "dtype": str(self.pipeline.transformer.dtype).removeprefix("torch."),
            "seed": seed,
            "steps": request.steps,
            "guidance": request.guidance,
            "source_guidance": request.source_guidance,
            "width": request.width,
            "height": request.height,
        }


def check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """Refuse a number out of its range; NaN is out of every range."""
    low, high = limits
    if not low <= value <= high:
        is_short = isinstance(value, float) or abs(value) < 1e300
        shown = f"{value:.10g}" if is_short else "a number of more than 300 digits"
        raise RefusedError(f"The {name} is {shown}: choose one from {low:.10g} to {high:.10g}.")


def _open(path: Path, number: int) -> Image.Image:
    try:
        return images.open_image(path, max_pixels=MAX_IMAGE_PIXELS)
    except images.BadImageError as error:
        raise RefusedError(f"Picture {number}: {error.message}; {error.hint}.") from error


def _open_mask(path: Path, source: Image.Image) -> Image.Image:
    try:
        return open_mask(path, source.size, max_pixels=MAX_IMAGE_PIXELS)
    except images.BadImageError as error:
        raise RefusedError(f"The mask: {error.message}; {error.hint}.") from error

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
from itertools import compress
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
from mige.inference.shapes import Shape
from mige.models.instruction import MAX_WORDS, full_text
from mige.tasks import MAX_REFERENCES, Task
from mige.utils import images
from mige.utils.masks import open_mask
from mige.web.adapting import SCALES, AdapterScales
from mige.web.instructions import Reading, RefusedError, check_negative, read
from mige.web.pace import Pace
from mige.web.request import (
    GUIDANCE,
    MAX_AT_ONCE,
    SEEDS,
    SOURCE_GUIDANCE,
    STEPS,
    Defaults,
    Made,
    Request,
    SafetyChecker,
    Step,
    Stopped,
    check_range,
)
from mige.web.strokes import as_lists, draw

MAX_IMAGE_PIXELS = 65_000_000  # of an upload: a photograph of 64 megapixels passes
PREVIEWS = 6  # of a run; each decodes the estimates of all its pictures


class GenerationService:
    """One model and the one thread that works with it: requests wait for each other, in the order they come.

    Args:
        adapters: folder or file and scale of all that were added to the pipeline, in that order.
        safety_checker: sees the pictures of a request before the work, and the results after it; there are no previews
            then.
    """

    def __init__(
        self,
        pipeline: MIGEPipeline,
        name: str,
        *,
        adapters: Sequence[tuple[str, float]] = (),
        safety_checker: SafetyChecker | None = None,
    ):
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline, self.name, self.safety_checker = pipeline, name, safety_checker
        self.adapters, self.pace = AdapterScales(pipeline, adapters), Pace()
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
            if request.width == request.height == 0:  # as the source, or as `wish` says
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
            how = resolve(self.pipeline.scheduler.config, request.task, *given)
        except ValueError as error:
            raise RefusedError(f"{error}.") from error
        if request.negative:
            check_negative(request.negative, any(branch.drop_text for branch in how.branches))
        if request.mask and request.task is Task.SUBJECT:
            raise RefusedError("A mask says what of picture 1 may change, but nothing is edited here: clear it.")
        if request.scales is not None and len(request.scales) != len(self.adapters.offered):
            raise RefusedError(f"There are {len(request.scales)} scales for {len(self.adapters.offered)} adapters.")
        for one, scale in zip(self.adapters.offered, request.scales or (), strict=False):
            check_range(f"scale of {one.label}", scale, SCALES)
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
        with self.pace.running():
            return self._made(request, reading, on_step)

    def _made(self, request: Request, reading: Reading, on_step: OnStep) -> Made:
        started = time.perf_counter()
        opened = {number: _open(request.pictures[number - 1], number) for number in sorted(set(reading.numbers))}
        references = [opened[number] for number in reading.numbers]
        source = None if request.task is Task.SUBJECT else opened[1]
        many = len(request.seeds)
        if any(self._withheld(list(opened.values()))):
            raise RefusedError("The safety check of this server refuses a picture of yours: use another.")
        try:
            shape = request.size.of_task(self.pipeline.sizes, request.task, source and source.size)
            before = source and fit_source(source, shape.whole, *shape.size)
            mask = _mask(request, source)
            if mask and fit_source(mask, shape.whole, *shape.size).getextrema()[1] < 128:
                raise RefusedError("Nothing of the mask is left at this size: paint a larger region.")
            self.adapters.use(request.scales)
            pictures = self.pipeline(
                [reading.prompt] * many,
                [references] * many,
                source and [source] * many,
                **request.size.arguments(),
                paste_back=request.paste_back,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                source_guidance_scale=request.source_guidance,
                seed=request.seeds,
                negative_prompt=[request.negative] * many if request.negative else None,
                mask=mask,
                on_step=on_step,
            ).images
        except images.BadImageError as error:  # one so long that scaling it would need too much memory
            raise RefusedError(f"A {error.args[0]} has {error.message}: {error.hint}.") from error
        passed = [not is_withheld for is_withheld in self._withheld(pictures)]
        if not any(passed):
            raise RefusedError("The safety check of this server withheld what was made: ask for something else.")
        settings = [self._settings(request, reading, shape, seed) for seed in request.seeds]
        return Made(list(compress(pictures, passed)), list(compress(settings, passed)), before,
                    time.perf_counter() - started)  # fmt: skip

    def _withheld(self, pictures: list[Image.Image]) -> list[bool]:
        if self.safety_checker is None:
            return [False] * len(pictures)
        return [bool(one) for one in self.safety_checker(pictures)]

    def _watch(self, steps: int, events: SimpleQueue, stop: threading.Event, previews: int) -> OnStep:
        """What happens after every step: stop if asked to, else report, now and then with previews."""
        every = -(-steps // previews) if previews else steps

        def on_step(step: int, x: Tensor, x0: Tensor) -> None:
            if stop.is_set() or self._closed.is_set():
                raise Stopped
            self.pace.step(step + 1, steps)
            due = (step + 1) % every == 0 and step + 1 < steps and self.safety_checker is None
            events.put(Step(step + 1, steps, images.to_pil(self.pipeline.decode(x0)) if due else None))

        return on_step

    def _settings(self, request: Request, reading: Reading, shape: Shape, seed: int) -> dict[str, Any]:
        sides = shape if request.wish else request
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
            "width": sides.width,
            "height": sides.height,
            "negative": request.negative,
            "mask": [] if isinstance(request.mask, Path) else as_lists(request.mask or ()),
            "adapters": self.adapters.named(request.scales),
        }


def _open(path: Path, number: int) -> Image.Image:
    try:
        return images.open_image(path, max_pixels=MAX_IMAGE_PIXELS)
    except images.BadImageError as error:
        raise RefusedError(f"Picture {number}: {error.message}; {error.hint}.") from error


def _mask(request: Request, source: Image.Image | None) -> Image.Image | None:
    """The mask of a request, of its source's size: drawn, or in a file."""
    if not isinstance(request.mask, Path):
        return draw(request.mask, source.size) if request.mask else None
    try:
        return open_mask(request.mask, source.size, max_pixels=MAX_IMAGE_PIXELS)
    except images.BadImageError as error:
        raise RefusedError(f"The mask: {error.message}; {error.hint}.") from error

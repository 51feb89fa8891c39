"""A run: records through the pipeline into a folder that can be looked at, resumed and sent to somebody.

The folder holds config.json, images/<id>.png, results.jsonl (a line a finished record), failures.jsonl where records
were bad, contact_sheet.png and index.html. Several processes share a run: each takes every N-th record and keeps
its own results-<process>.jsonl until the end.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer

from mige.checkpoints import folder as checkpoint
from mige.data.checks import check_images, check_instruction
from mige.data.records import Record, Report
from mige.diffusion.settings import resolve
from mige.inference.adapters import scheduler_config
from mige.inference.folder import RunError, check_folder, claim, merge_results, open_folder, write_failures
from mige.inference.noise import Drawn, draw_noise, record_generator
from mige.inference.opened import OpenedRecords
from mige.inference.pages import write_pages
from mige.inference.pipeline import MIGEPipeline
from mige.inference.results import ResultsWriter, read_finished
from mige.inference.samples import Sample, SampleNoise
from mige.inference.settings import Settings
from mige.inference.shapes import NATIVE, Shape
from mige.inference.sizes import SizeGrid
from mige.models.fusion import MIGEFusion
from mige.models.instruction import read_prompt
from mige.tasks import Task
from mige.utils import images
from mige.utils.progress import Progress

__all__ = [
    "OpenedRecords",
    "RunError",
    "Settings",
    "check",
    "check_folder",
    "claim",
    "record_generator",
    "run",
    "write_failures",
]


Ahead = tuple[list[Record], list[SampleNoise], Future[list[Sample]]]
"""A chunk of records of one task and shape, their noise, and their samples to come."""


def check(report: Report, model: Path, settings: Settings, opened: OpenedRecords | None = None) -> Report:
    """Everything that can be wrong, found before weights load: images and prompts of the report's records.

    Images are tried at the size of the run: one too long to be fitted to it is an error. Targets are not needed for
    inference and not opened. What is read is kept in `opened`, for `run`. Returns a report whose records are all fit
    to run. Raises CheckpointError if the model folder is not whole, ValueError for a size that it cannot make and for a
    guidance that it does not take.
    """
    checkpoint.verify(model)
    size = settings.wish.shape(SizeGrid.of_folder(model), None).size  # of what follows a source, the native one
    scheduler = scheduler_config(model, [path for path, _ in settings.adapters])
    resolve(scheduler, Task.EDIT, settings.steps, settings.guidance, settings.source_guidance)
    fusion = MIGEFusion.load_config(model / "fusion")
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    opened = opened or OpenedRecords(ignore_profiles=settings.ignore_profiles)
    issues = list(report.issues)
    own = [replace(record, target=None) for record in report.records]
    issues += check_images(own, size=size, opener=opened.image)
    for record in report.records:
        instruction = read_prompt(record.task, record.prompt, record.edit_type, tokenizer)
        opened.instructions[record] = instruction
        issues += check_instruction(record, instruction, tokenizer, fusion["num_queries"], fusion["max_tokens"])
    bad = {issue.where for issue in issues if issue.fatal}
    return Report([record for record in report.records if record.where not in bad], issues)


def run(
    records: Sequence[Record],
    pipeline: MIGEPipeline,
    settings: Settings,
    folder: Path,
    *,
    batch_size: int | None = None,
    note: str = "",
    sheets: bool | None = None,
    state: PartialState | None = None,
    opened: OpenedRecords | None = None,
) -> None:
    """Run the records that the folder has no image of yet, then write the pages.

    Args:
        records: checked (see `check`); any mixture of tasks.
        batch_size: prompts at a time; does not change the images (with the official noise it does, as it did there).
        note: a line shown on top of the pages.
        sheets: draw contact sheets too; None: where a single one holds all records.
        state: of accelerate, where several processes run the same records; the first of them writes the pages.
        opened: what `check` has read of the records.

    Raises RunError where `check_folder` does, if memory is short and if an image comes out as NaN; ValueError for a
    size off the grid.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    opened = opened or OpenedRecords(ignore_profiles=settings.ignore_profiles)
    shapes = _shapes(records, pipeline, settings, opened)
    opened.whole = {record for record in records if shapes[record].whole}
    process, processes = (state.process_index, state.num_processes) if state else (0, 1)
    with claim(folder) if process == 0 else nullcontext():
        if process == 0:
            open_folder(folder, settings, records)
        _wait_for_everyone(state)  # from here on results.jsonl is the same for all until all have finished
        results = ResultsWriter(folder, f"results-{process}.jsonl" if processes > 1 else "results.jsonl", settings)
        finished = read_finished(folder, [folder / "results.jsonl"]).lines
        todo = [record for record in records if record.id not in finished]
        todo = [record for task in Task for record in [r for r in todo if r.task is task][process::processes]]
        pipeline.set_progress_bar_config(disable=True)
        with Progress(total=len(todo), unit="image", desc="inference", disable=not todo or process > 0) as bar:
            chunks = draw_noise(pipeline, settings, records, todo, batch_size, shapes)
            _make(pipeline, settings, chunks, opened, results, bar)
        _wait_for_everyone(state)
        if process == 0:
            lines = merge_results(folder)
            if lost := [record.id for record in records if record.id not in lines]:
                raise RunError(
                    f"{folder}: {', '.join(lost[:20])} made, and gone again; does something else write there?"
                )
            write_pages(records, lines, settings, folder, note, sheets)


def _shapes(
    records: Sequence[Record], pipeline: MIGEPipeline, settings: Settings, opened: OpenedRecords
) -> dict[Record, Shape]:
    """The shape of each record's image."""
    if settings.size == NATIVE:
        return dict.fromkeys(records, Shape(*pipeline.output_size(settings.height, settings.width)))
    grid, wish = pipeline.sizes, settings.wish
    return {r: wish.of_task(grid, r.task, None if r.source is None else opened.size(r.source)) for r in records}


def _make(
    pipeline: MIGEPipeline,
    settings: Settings,
    chunks: Iterable[Drawn],
    opened: OpenedRecords,
    results: ResultsWriter,
    bar: Progress,
) -> None:
    """Chunk by chunk: the images of the next are opened and those of the last are saved meanwhile.

    Lines are written in order; images in several threads, as a PNG takes longer than a few steps on a GPU.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(8) as savers:
        writing: list[Future] = []
        for chunk, noise, samples in _opened_ahead(chunks, reader, opened):
            made = _run_chunk(pipeline, settings, chunk, noise, samples, bar)
            _wait(writing)
            writing = [
                writer.submit(results.add, record, facts, savers.submit(results.save, record, image))
                for record, image, facts in made
            ]
        _wait(writing)


def _wait_for_everyone(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


def _opened_ahead(chunks: Iterable[Drawn], reader: ThreadPoolExecutor, opened: OpenedRecords) -> Iterator[Ahead]:
    """The chunks with their samples to come: images are opened while the chunk before is computed."""
    before = None
    for chunk, noise in chunks:
        coming = chunk, noise, reader.submit(lambda chunk=chunk: [opened.sample(record) for record in chunk])
        if before is not None:
            yield before
        before = coming
    if before is not None:
        yield before


def _run_chunk(
    pipeline: MIGEPipeline,
    settings: Settings,
    chunk: Sequence[Record],
    noise: Sequence[SampleNoise],
    samples: Future[list[Sample]],
    bar: Progress,
) -> list[tuple[Record, images.Image.Image, dict[str, Any]]]:
    """Records with their images and further facts."""
    task = chunk[0].task
    names = ", ".join(record.id for record in chunk)
    how = resolve(pipeline.scheduler.config, task, settings.steps, settings.guidance, settings.source_guidance)
    started = time.perf_counter()
    try:
        made = pipeline.run(
            samples.result(),
            noise,
            steps=how.steps,
            text_guidance=how.guidance,
            source_guidance=how.source_guidance,
            on_step=lambda *_: bar.update(len(chunk) / how.steps),
            reuse=settings.reuse,
            output_type="pil",
            paste_back=settings.paste_back,
        )
    except torch.OutOfMemoryError as error:
        most = max(len(record.references) for record in chunk)
        raise RunError(
            f"out of memory on {names} ({len(chunk)} at a time, up to {most} references each): "
            "give a smaller --batch-size, size or number of references"
        ) from error
    except ValueError as error:
        raise RunError(f"{names}: {error}") from error
    pipeline.maybe_free_model_hooks()
    seconds = round((time.perf_counter() - started) / len(chunk), 3)
    facts = {"seed": settings.seed, "steps": how.steps, "guidance": how.guidance}
    facts |= {"source_guidance": how.source_guidance, "seconds": seconds}
    return [(record, image, facts | {"size": image.size}) for record, image in zip(chunk, made, strict=True)]


def _wait(writing: Iterable[Future]) -> None:
    """Until these images are on the disk; raises RunError for what went wrong there."""
    try:
        for future in writing:
            future.result()
    except OSError as error:
        raise RunError(str(error)) from error

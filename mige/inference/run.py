"""A run: records through the pipeline into a folder that can be looked at, resumed and sent to somebody.

The folder holds config.json, images/<id>.png, results.jsonl (a line a finished record), failures.jsonl where records
were bad, contact_sheet.png and index.html. Several processes share a run: each takes every so-manieth record and keeps
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
from tqdm import tqdm
from transformers import AutoTokenizer

from mige.checkpoints import folder as checkpoint
from mige.data.checks import check_images, check_lengths
from mige.data.records import Record, Report
from mige.diffusion.settings import resolve
from mige.inference.adapters import scheduler_config
from mige.inference.folder import RunError, check_folder, claim, merge_results, open_folder, write_failures
from mige.inference.noise import Drawn, draw_noise, record_generator
from mige.inference.pages import write_pages
from mige.inference.pipeline import MIGEPipeline
from mige.inference.results import ResultsWriter, read_finished
from mige.inference.samples import Sample, SampleNoise
from mige.inference.settings import Settings, check_size, image_size
from mige.models.fusion import MIGEFusion
from mige.tasks import Task
from mige.utils import images

__all__ = [
    "RunError",
    "Settings",
    "check",
    "check_folder",
    "check_size",
    "claim",
    "record_generator",
    "run",
    "write_failures",
]


def check(report: Report, model: Path, settings: Settings) -> Report:
    """Everything that can be wrong, found before weights load: images and prompts of the report's records.

    Images are tried at the size of the run: one too long to be fitted to it is a fault. Targets are not needed for
    inference and not opened. Returns a report whose records are all fit to run. Raises CheckpointError if the model
    folder is not whole, ValueError for a size that it cannot make and for a guidance that it does not take.
    """
    checkpoint.verify(model)
    check_size(settings, model)
    scheduler = scheduler_config(model, settings.lora and Path(settings.lora))
    resolve(scheduler, Task.EDIT, settings.steps, settings.guidance, settings.source_guidance)
    fusion = MIGEFusion.load_config(model / "fusion")
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    findings = list(report.findings)
    size, ignore_profiles = image_size(settings, model), settings.ignore_profiles
    own = [replace(record, target=None) for record in report.records]
    findings += check_images(own, size=size, ignore_profiles=ignore_profiles)
    findings += check_lengths(report.records, tokenizer, fusion["num_queries"], fusion["max_tokens"])
    bad = {finding.where for finding in findings if finding.fatal}
    return Report([record for record in report.records if record.where not in bad], findings)


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
) -> None:
    """Run the records that the folder has no picture of yet, then write the pages.

    Args:
        records: checked (see `check`); any mixture of tasks.
        batch_size: prompts at a time; does not change the pictures (with the official noise it does, as it did there).
        note: a line shown on top of the pages.
        sheets: draw contact sheets too; None: where a single one holds all records.
        state: of accelerate, where several processes run the same records; the first of them writes the pages.

    Raises RunError where `check_folder` does, if memory is short and if a picture comes out as NaN; ValueError for a
    size off the grid.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = pipeline.output_size(settings.height, settings.width)
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
        with tqdm(total=len(todo), unit="image", bar_format=_BAR, disable=not todo or process > 0) as bar:
            _make(pipeline, settings, draw_noise(pipeline, settings, records, todo, batch_size, size), results, bar)
        _wait_for_everyone(state)
        if process == 0:
            lines = merge_results(folder)
            if lost := [record.id for record in records if record.id not in lines]:
                raise RunError(
                    f"{folder}: {', '.join(lost[:20])} made, and gone again; does something else write there?"
                )
            write_pages(records, lines, settings, folder, note, sheets)


def _make(
    pipeline: MIGEPipeline, settings: Settings, chunks: Iterable[Drawn], results: ResultsWriter, bar: tqdm
) -> None:
    """Chunk by chunk: the pictures of the next are opened and those of the last are saved meanwhile."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: list[Future] = []
        for chunk, noise, opened in _opened_ahead(chunks, reader, settings.ignore_profiles):
            made = _run_chunk(pipeline, settings, chunk, noise, opened, bar)
            _wait(writing)
            writing = [writer.submit(results.add, *result) for result in made]
        _wait(writing)


def _wait_for_everyone(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"


def _opened_ahead(
    chunks: Iterable[Drawn], reader: ThreadPoolExecutor, ignore_profiles: bool
) -> Iterator[tuple[list[Record], list[SampleNoise], Future]]:
    """The chunks with their samples to come: pictures are opened while the chunk before is computed."""
    before = None
    for chunk, noise in chunks:
        coming = chunk, noise, reader.submit(lambda chunk=chunk: [_load(record, ignore_profiles) for record in chunk])
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
    opened: Future,
    bar: tqdm,
) -> list[tuple[Record, images.Image.Image, dict[str, Any]]]:
    """Records with their pictures and further facts."""
    task = chunk[0].task
    names = ", ".join(record.id for record in chunk)
    how = resolve(pipeline.scheduler.config, task, settings.steps, settings.guidance, settings.source_guidance)
    started = time.perf_counter()
    try:
        final = pipeline.run(
            opened.result(),
            noise,
            steps=how.steps,
            text_guidance=how.guidance,
            source_guidance=how.source_guidance,
            on_step=lambda *_: bar.update(len(chunk) / how.steps),
            reuse=settings.reuse,
        )
        pictures = images.to_pil(pipeline.decode(final))
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
    return [(record, picture, facts | {"size": picture.size}) for record, picture in zip(chunk, pictures, strict=True)]


def _wait(writing: Iterable[Future]) -> None:
    """Until these pictures are on the disk; raises RunError for what went wrong there."""
    try:
        for future in writing:
            future.result()
    except OSError as error:
        raise RunError(str(error)) from error


def _load(record: Record, ignore_profiles: bool) -> Sample:
    """Open a record's pictures, each once: the source is the same object as its reference."""
    opened = {
        path: images.open_image(path, ignore_profiles=ignore_profiles) for path in dict.fromkeys(record.references)
    }
    source = None if record.source is None else opened[record.source]
    references = tuple(opened[path] for path in record.references)
    return Sample(record.task, record.prompt, references, source, record.edit_type)

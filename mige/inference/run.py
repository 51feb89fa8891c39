"""A run: records through the pipeline into a folder that can be looked at, resumed and sent to somebody.

The folder holds config.json, images/<id>.png, results.jsonl (a line a finished record), failures.jsonl where records
were bad, contact_sheet.png and index.html. Several processes share a run: each takes every so-manieth record and keeps
its own results-<process>.jsonl until the end.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from tqdm import tqdm
from transformers import AutoTokenizer

import mige
from mige.checkpoints import folder as checkpoint
from mige.data.checks import check_images, check_lengths
from mige.data.records import Record, Report
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise
from mige.models.fusion import MIGEFusion
from mige.reports.page import Case, contact_sheet, html_page
from mige.tasks import TASKS, Task
from mige.utils import images
from mige.utils.files import write_text


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says which records and what to do."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run's pictures look like. None: the official value of the record's task."""

    model: str  # checkpoint folder or hub name
    dtype: str  # of the weights: float32, bfloat16
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    source_guidance: float | None = None
    height: int | None = None  # pixels; None: the model's native size
    width: int | None = None
    lora: str | None = None  # folder of adapters added to the model
    vae_dtype: str = "float32"  # or bfloat16
    t5_bits: int | None = None  # 8 or 4: the text encoder's matrices rounded to so many bits
    guidance_low: float = 0.0  # model times that are guided, the full branch alone elsewhere (an approximation)
    guidance_high: float = 1000.0
    reuse: int = 1  # the DiT's middle blocks are computed every so many steps (above 1 an approximation)
    noise: str = "record"  # "record": a generator a record; "official": drawn a chunk at a time, as released

    def __post_init__(self):
        if self.noise not in ("record", "official"):
            raise ValueError(f"noise must be 'record' or 'official', got {self.noise!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.vae_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"vae_dtype must be 'float32' or 'bfloat16', got {self.vae_dtype!r}")
        for name in ("model", "lora"):  # one folder, one spelling: "x/" and "./x" are "x"
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.normpath(folder))


_DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}


def check_size(settings: Settings, model: Path) -> None:
    """Raise ValueError if the model cannot make pictures of the settings' size; reads its configs only."""
    blocks = AutoencoderKL.load_config(model / "vae")["block_out_channels"]
    grid = 2 ** (len(blocks) - 1) * PixArtTransformer2DModel.load_config(model / "transformer")["patch_size"]
    for name in ("height", "width"):
        side = getattr(settings, name)
        if side is not None and (side < grid or side % grid):
            raise ValueError(f"{name} must be a multiple of {grid} px, got {side}")


def check(report: Report, model: Path) -> Report:
    """Everything that can be wrong, found before weights load: pictures and prompt lengths of the report's records.

    Targets are not needed for inference and not opened. Returns a report whose records are all fit to run. Raises
    CheckpointError if the model folder is not whole.
    """
    checkpoint.verify(model)
    fusion = MIGEFusion.load_config(model / "fusion")
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    findings = list(report.findings)
    findings += check_images([replace(record, target=None) for record in report.records])
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
    state: PartialState | None = None,
) -> None:
    """Run the records that the folder has no picture of yet, then write the pages.

    Args:
        records: checked (see `check`); any mixture of tasks.
        batch_size: prompts at a time; does not change the pictures (with the official noise it does, as it did there).
        note: a line shown on top of the pages.
        state: of accelerate, where several processes run the same records; the first of them writes the pages.

    Raises RunError where `check_folder` does, if memory is short and if a picture comes out as NaN; ValueError for a
    size off the grid.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    size = pipeline.output_size(settings.height, settings.width)
    process, processes = (state.process_index, state.num_processes) if state else (0, 1)
    if process == 0:
        _open_folder(folder, settings, records)
    _wait_for_everyone(state)  # from here on results.jsonl is the same for all until all have finished
    results = _Results(folder, f"results-{process}.jsonl" if processes > 1 else "results.jsonl")
    todo = [record for record in records if record.id not in results.lines]
    todo = [record for task in Task for record in [r for r in todo if r.task is task][process::processes]]
    pipeline.set_progress_bar_config(disable=True)
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
        tqdm(total=len(todo), unit="image", bar_format=_BAR, disable=not todo or process > 0) as bar,
    ):
        writing: list[Future] = []
        for chunk, noise, opened in _opened_ahead(
            _chunks_of_all_tasks(pipeline, settings, records, todo, batch_size, size), reader
        ):
            finished = _run_chunk(pipeline, settings, chunk, noise, opened, bar)
            _wait(writing)
            writing = [writer.submit(results.add, *result) for result in finished]
        _wait(writing)
    _wait_for_everyone(state)
    if process == 0:
        _merge_results(folder)
        _write_pages(records, _finished(folder), settings, folder, note)


def _wait_for_everyone(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()


_BAR = "{percentage:3.0f}% |{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"


Drawn = tuple[list[Record], list[SampleNoise]]
"""A chunk of records of one task, and the noise of each."""


def _opened_ahead(
    chunks: Iterable[Drawn], reader: ThreadPoolExecutor
) -> Iterator[tuple[list[Record], list[SampleNoise], Future]]:
    """The chunks with their samples to come: pictures are opened while the chunk before is computed."""
    before = None
    for chunk, noise in chunks:
        coming = chunk, noise, reader.submit(lambda chunk=chunk: [_load(record) for record in chunk])
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
    steps = settings.steps or TASKS[task].steps
    started = time.perf_counter()
    try:
        final = pipeline.run(
            opened.result(),
            noise,
            steps=steps,
            text_guidance=settings.guidance,
            source_guidance=settings.source_guidance,
            on_step=lambda *_: bar.update(len(chunk) / steps),
            **_approximations(settings),
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
    facts = {**_resolved(settings, task), "seconds": seconds}
    return [(record, picture, facts | {"size": picture.size}) for record, picture in zip(chunk, pictures, strict=True)]


def _approximations(settings: Settings) -> dict[str, Any]:
    interval = settings.guidance_low, settings.guidance_high
    return {"guidance_interval": None if interval == (0.0, 1000.0) else interval, "reuse": settings.reuse}


def _wait(writing: Iterable[Future]) -> None:
    """Until these pictures are on the disk; raises what went wrong there."""
    for future in writing:
        future.result()


def _load(record: Record) -> Sample:
    """Open a record's pictures, each once: the source is the same object as its reference."""
    opened = {path: images.open_image(path) for path in dict.fromkeys(record.references)}
    source = None if record.source is None else opened[record.source]
    references = tuple(opened[path] for path in record.references)
    return Sample(record.task, record.prompt, references, source, record.edit_type)


def _resolved(settings: Settings, task: Task) -> dict[str, Any]:
    official = TASKS[task]
    return {
        "seed": settings.seed,
        "steps": settings.steps or official.steps,
        "guidance": official.guidance if settings.guidance is None else settings.guidance,
        "source_guidance": official.source_guidance if settings.source_guidance is None else settings.source_guidance,
    }


# ---- noise -----------------------------------------------------------------------------------------------------------


def record_generator(seed: int, record_id: str) -> torch.Generator:
    """A CPU generator that belongs to one record: no result depends on batch size, order or skipped records."""
    digest = hashlib.sha256(f"{seed}:{record_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def _chunks_of_all_tasks(
    pipeline: MIGEPipeline,
    settings: Settings,
    records: Sequence[Record],
    todo: Sequence[Record],
    batch_size: int | None,
    size: tuple[int, int],
) -> Iterator[Drawn]:
    for task in Task:
        every, pending = ([record for record in some if record.task is task] for some in (records, todo))
        yield from _draw(pipeline, settings, every, pending, batch_size or TASKS[task].batch_size, size)


def _draw(
    pipeline: MIGEPipeline,
    settings: Settings,
    every: Sequence[Record],
    pending: Sequence[Record],
    batch: int,
    size: tuple[int, int],
) -> Iterator[Drawn]:
    """Chunks of records of one task with their noise."""
    if settings.noise == "official":
        yield from _draw_official(pipeline, settings.seed, every, pending, batch, size)
        return
    for chunk in _chunks(pending, batch):
        generators = [record_generator(settings.seed, record.id) for record in chunk]
        yield (
            chunk,
            [
                pipeline.draw_noise(record.task, len(record.references), generator, *size)
                for record, generator in zip(chunk, generators, strict=True)
            ],
        )


def _draw_official(
    pipeline: MIGEPipeline,
    seed: int,
    every: Sequence[Record],
    pending: Sequence[Record],
    batch: int,
    size: tuple[int, int],
) -> Iterator[Drawn]:
    """The released scripts' noise: latents a whole chunk at once from the device's generator, seeded once a task.

    Chunks are cut from all records, finished ones too, so that resuming does not shift anything. The VAE's noise comes
    from the CPU generator after the scripts' 30 unused draws; there, building the model consumed that generator too,
    which depends on library versions, so only the latents are the released ones.
    """
    on_cpu = torch.Generator().manual_seed(seed)
    for _ in range(30):
        torch.randn(1, 4, 512, 512, generator=on_cpu)
    device = pipeline._execution_device
    on_device = torch.Generator(device).manual_seed(seed)
    wanted = {record.id for record in pending}
    for chunk in _chunks(every, batch):
        start = torch.randn(len(chunk), *pipeline.latent_shape(*size), generator=on_device, device=device).cpu()
        posterior = [pipeline.draw_noise(record.task, len(record.references), on_cpu, *size) for record in chunk]
        noise = [replace(p, latent=latent) for p, latent in zip(posterior, start, strict=True)]
        kept = [(record, n) for record, n in zip(chunk, noise, strict=True) if record.id in wanted]
        if kept:
            yield [record for record, _ in kept], [n for _, n in kept]


def _chunks(records: Sequence[Record], size: int) -> Iterator[list[Record]]:
    for first in range(0, len(records), size):
        yield list(records[first : first + size])


# ---- the run folder --------------------------------------------------------------------------------------------------


def check_folder(folder: Path, settings: Settings, records: Sequence[Record]) -> None:
    """Raise RunError if the folder holds a run with other settings or other records of the same ids. Writes nothing."""
    config, ours = folder / "config.json", asdict(settings)
    if config.exists():
        theirs = json.loads(config.read_text("utf-8")).get("settings", {})
        theirs = _DEFAULTS | theirs  # of a run made before a setting was there
        differing = [f"{key}: {theirs.get(key)} there, {ours[key]} now" for key in ours if theirs.get(key) != ours[key]]
        if differing:
            raise RunError(f"{folder} holds a run with other settings ({'; '.join(differing)}): use another --output")
    finished = _finished(folder, *sorted(folder.glob("results-*.jsonl")))
    for record in records:
        if record.id in finished and finished[record.id]["record"] != _identity(record):
            raise RunError(
                f"{record.where}: {folder} has a finished {record.id!r} with another prompt or other pictures: "
                "use another --output or another id"
            )


def _write_config(folder: Path, settings: Settings) -> None:
    """config.json: the settings, and the versions that the run began with."""
    if (folder / "config.json").exists():
        return
    versions = {"mige": mige.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    config = {"settings": asdict(settings), "versions": versions}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _open_folder(folder: Path, settings: Settings, records: Sequence[Record]) -> None:
    """Make the folder ready for a run or for going on with one."""
    check_folder(folder, settings, records)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for half_written in (folder / "images").glob(".*.part"):  # of a killed run
        half_written.unlink()
    _write_config(folder, settings)
    _merge_results(folder)


def _merge_results(folder: Path) -> None:
    """Put what each process finished into results.jsonl: of this run, or of one that was killed."""
    parts = sorted(folder.glob("results-*.jsonl"))
    write_text(folder / "results.jsonl", _json_lines(_finished(folder, *parts).values()))
    for part in parts:
        part.unlink()


def _finished(folder: Path, *parts: Path) -> dict[str, dict[str, Any]]:
    """The lines of results.jsonl and of further such files by id, without those that have lost their picture."""
    found = [path.read_bytes() for path in (folder / "results.jsonl", *parts) if path.exists()]
    # A last line without its end was cut by a kill: its record runs again.
    lines = [json.loads(line) for text in found for line in text.split(b"\n")[:-1]]
    return {line["id"]: line for line in lines if (folder / line["image"]).is_file()}


class _Results:
    """A process's lines, one a record, each written after its picture: the truth about what is finished."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.path = folder, folder / name
        self.lines = _finished(folder)

    def add(self, record: Record, picture: images.Image.Image, facts: Mapping[str, Any]) -> None:
        """Save the picture, then the line; `facts`: further fields of it. Both are on the disk when this returns."""
        name = f"images/{record.id}.png"
        images.save_image(picture, self.folder / name)
        line = {"id": record.id, "task": record.task, "image": name, "record": _identity(record), **facts}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_json_lines([line]))
            file.flush()
            os.fsync(file.fileno())
        self.lines[record.id] = line


def _identity(record: Record) -> dict[str, Any]:
    return {
        "prompt": record.prompt,
        "edit_type": record.edit_type,
        "references": [str(path) for path in record.references],
        "source": None if record.source is None else str(record.source),
    }


def write_failures(report: Report, folder: Path) -> Path:
    """failures.jsonl: a line a fault; without faults, one of an earlier run is removed. Returns its path."""
    path = folder / "failures.jsonl"
    if report.faults:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"where": f.where, "problem": f.problem, "remedy": f.remedy} for f in report.faults]
        write_text(path, _json_lines(lines))
    else:
        path.unlink(missing_ok=True)
    return path


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_pages(
    records: Sequence[Record], lines: Mapping[str, Mapping[str, Any]], settings: Settings, folder: Path, note: str
) -> None:
    cases = [_case(record, lines[record.id], folder) for record in records]
    summary = {"model": settings.model, "seed": str(settings.seed), "weights": settings.dtype, "mige": mige.__version__}
    contact_sheet(cases, folder / "contact_sheet.png", note=note)
    html_page(cases, folder, title="MIGE results", note=note, summary=summary)


def _case(record: Record, line: Mapping[str, Any], folder: Path) -> Case:
    inputs = tuple(
        (f"picture {n}" + (", source" if path == record.source else ""), path)
        for n, path in enumerate(record.references, start=1)
    )
    detail = f"seed {line['seed']}, {line['steps']} steps, guidance {line['guidance']:g}"
    if record.task is not Task.SUBJECT:
        detail += f", source guidance {line['source_guidance']:g}"
    detail += f", {line['seconds']:.1f} s"
    return Case(record.id, record.task, record.prompt, inputs, folder / line["image"], detail)

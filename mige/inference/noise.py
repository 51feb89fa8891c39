"""The noise that each record of a run starts from: its own generator's, or the released scripts'."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from mige.data.records import Record
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import SampleNoise
from mige.inference.settings import Settings
from mige.inference.shapes import Shape
from mige.tasks import TASKS, Task

Drawn = tuple[list[Record], list[SampleNoise]]
"""A chunk of records of one task and shape, and the noise of each."""


def record_generator(seed: int, record_id: str) -> torch.Generator:
    """A CPU generator that belongs to one record: no result depends on batch size, order or skipped records."""
    digest = hashlib.sha256(f"{seed}:{record_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


def draw_noise(
    pipeline: MIGEPipeline,
    settings: Settings,
    records: Sequence[Record],
    todo: Sequence[Record],
    batch_size: int | None,
    shapes: Mapping[Record, Shape],
) -> Iterator[Drawn]:
    """The records of `todo` in chunks of one task and shape, task by task, each record with its noise.

    Args:
        records: of the whole run: the official noise is drawn for them all, whatever is finished.
        todo: those that have no image yet.
        batch_size: records of a chunk; None: the official one of each task.
        shapes: of the images; one for all with the official noise.
    """
    for task in Task:
        of_task = [record for record in records if record.task is task]
        order = {shape: place for place, shape in enumerate(dict.fromkeys(shapes[record] for record in of_task))}
        pending = sorted((r for r in todo if r.task is task), key=lambda record: order[shapes[record]])
        batch = batch_size or TASKS[task].batch_size
        for shape, alike in groupby(pending, lambda record: shapes[record]):
            every = [record for record in of_task if shapes[record] == shape]
            yield from _draw(pipeline, settings, every, list(alike), batch, shape.size)


def _draw(
    pipeline: MIGEPipeline,
    settings: Settings,
    every: Sequence[Record],
    pending: Sequence[Record],
    batch: int,
    size: tuple[int, int],
) -> Iterator[Drawn]:
    """Chunks of records of one task and size with their noise."""
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

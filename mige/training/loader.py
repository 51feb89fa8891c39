"""The micro-batches that a process trains on, read ahead by workers."""

import os
import time
from collections.abc import Iterable, Iterator

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from mige.config import Config
from mige.data.batch import TrainingBatch, collate
from mige.data.order import ResumableBatchSampler
from mige.data.synthetic.stream import collate_world
from mige.training.metrics import Metrics


def build_loader(config: Config, dataset: Dataset, accelerator: Accelerator, step: int) -> DataLoader:
    """The micro-batches of this process from that step on."""
    settings, workers = config.train, config.data.workers
    indices = ResumableBatchSampler(
        batch=settings.batch_size,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        start=step,
    )
    return DataLoader(
        dataset,
        batch_sampler=indices,
        collate_fn=collate_world if config.data.world else collate,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_leave_group,
    )


def timed(batches: Iterable[TrainingBatch], metrics: Metrics) -> Iterator[TrainingBatch]:
    """The batches; how long each was waited for is added to the metrics."""
    batches = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        metrics.data_wait += time.perf_counter() - started
        yield batch


def _leave_group(_: int) -> None:
    """For the data loader's workers: a scheduler's SIGTERM to the process group must not reach them before the save.

    Ignoring it would not do: at an exception Python ends its workers by SIGTERM and waits for them.
    """
    os.setpgid(0, 0)

"""Everything a run will need is compiled before its first step: every width of the context, with and without images.

A block is compiled for each number of tokens and width that it meets, which takes seconds to minutes; met at step 5,000
on one card of many, it holds up all of them. `recompiles` in the metrics counts what was compiled after the warm-up.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mige.config import Config
from mige.data.batch import TrainingBatch, TrainingSample, collate
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.data.shapes import image_sizes
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction
from mige.models.vae import Moments
from mige.tasks import Task
from mige.training.objective import Judged

log = logging.getLogger("mige")


def warm_up(
    batches: Iterator[tuple[str, TrainingBatch]],
    device: torch.device,
    loss: Callable[[TrainingBatch], Judged],
    backward: Callable[[Tensor], None],
) -> int:
    """Forward and backward pass of every batch, each logged with its seconds as soon as it is done.

    Args:
        batches: of `warm_up_batches`.
        loss: of a batch on the device. backward: of its mean, []; the gradients are the caller's to drop.

    Returns the number of graphs that are compiled by now.
    """
    began, before = time.perf_counter(), compiled_graphs()
    for name, batch in batches:
        log.info("warm-up: %s: compiling", name)
        started = time.perf_counter()
        value = loss(batch.to(device)).mean()
        forward = time.perf_counter()
        backward(value)
        if device.type == "cuda":  # kernels are tuned when they first run
            torch.cuda.synchronize()
        done, graphs = time.perf_counter(), compiled_graphs()
        log.info("warm-up: %s: %.1f s forward, %.1f s backward, %d graphs compiled", name, forward - started,
                 done - forward, graphs - before)  # fmt: skip
        before = graphs
    log.info("warm-up: done in %.0f s", time.perf_counter() - began)
    return before


def warm_up_batches(
    config: Config, pipeline: MIGEPipeline, widths: Sequence[int]
) -> Iterator[tuple[str, TrainingBatch]]:
    """A micro-batch of every width, the widest first (so that too little memory shows at once), and one without images.

    Images of several shapes: of the first shape of each number of tokens so, of every other one of the widest alone.
    The numbers of images differ, as those of real batches do. With each comes what it is, in words.
    """
    many, seen = config.train.batch_size, set()
    for size in image_sizes(config.data, pipeline.sizes.step):
        of_size = f"{size[0]} x {size[1]} px, " if config.data.shapes else ""
        is_first = math.prod(size) not in seen
        seen.add(math.prod(size))
        for number, width in enumerate(sorted(widths, reverse=True)):
            if is_first or number == 0:
                images = [2 if place < number else 1 for place in range(many)]
                batch = collate([_sample(config, pipeline, width, one, size) for one in images])
                yield f"{of_size}width {width}", batch
        if is_first and pipeline.fusion.config.num_queries:
            batch = collate([_sample(config, pipeline, min(widths), 0, size) for _ in range(many)])
            yield f"{of_size}width {min(widths)} without images", batch


def _sample(config: Config, pipeline: MIGEPipeline, width: int, images: int, size: tuple[int, int]) -> TrainingSample:
    """Random noise as a sample whose context is that wide, with so many references, or as many as fit.

    size: height and width of its images, px.
    """
    queries, side = pipeline.fusion.config.num_queries, pipeline.image_encoder.config.image_size
    images = min(images, (width - 1) // max(queries, 1))
    shape, levels = pipeline.latent_shape(*size), config.train.noise_levels
    randomness = sample_randomness(sample_generator(0, images), 1 + images, shape, Dropout(), levels, 1000)
    words, stored = (1,) * (width - images * queries), config.data.features is not None
    pixels, moments = torch.zeros(1 + images, 3, *size), torch.zeros(1 + images, *shape)
    return TrainingSample(
        "warm-up",
        "warm-up",
        Task.SUBJECT,
        None,
        Instruction((words, *[()] * images)),
        torch.zeros(images, 3, side, side),
        None if stored else pixels,
        Moments(moments, moments) if stored else None,
        **randomness,
    )


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]

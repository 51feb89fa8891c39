"""Everything a run will need is compiled before its first step: every width of the context, with and without images.

A block is compiled for each shape that it meets, which takes seconds to minutes; met at step 5,000, on one card of
many, it holds up all of them. `recompiles` in the metrics counts what was compiled after the warm-up.
"""

from collections.abc import Iterator

import torch

from mige.config import Config
from mige.data.batch import TrainingBatch, TrainingSample, collate
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.inference.pipeline import MIGEPipeline
from mige.models.instruction import Instruction
from mige.models.vae import Moments
from mige.tasks import Task


def warm_up_batches(config: Config, pipeline: MIGEPipeline) -> Iterator[TrainingBatch]:
    """A micro-batch of every width, the widest first (so that too little memory shows at once), and one without images.

    Their numbers of images differ, as those of real batches do.
    """
    fusion, size, encoder = pipeline.fusion.config, config.train.batch_size, pipeline.model.encoder
    widths = encoder.widths if encoder.pad_to > 1 else encoder.widths[-1:]  # the VAE alone sees none of them
    for number, width in enumerate(reversed(widths)):
        yield collate([_sample(config, pipeline, width, 2 if place < number else 1) for place in range(size)])
    if fusion.num_queries:
        yield collate([_sample(config, pipeline, widths[0], 0) for _ in range(size)])


def _sample(config: Config, pipeline: MIGEPipeline, width: int, images: int) -> TrainingSample:
    """Random noise as a sample whose context is that wide, with so many references, or as many as fit."""
    queries, side = pipeline.fusion.config.num_queries, pipeline.image_encoder.config.image_size
    images = min(images, (width - 1) // max(queries, 1))
    shape, levels = pipeline.latent_shape(config.data.size, config.data.size), config.train.noise_levels
    randomness = sample_randomness(sample_generator(0, images), 1 + images, shape, Dropout(), levels, 1000)
    words, stored = (1,) * (width - images * queries), config.data.features is not None
    pixels, moments = torch.zeros(1 + images, 3, *[config.data.size] * 2), torch.zeros(1 + images, *shape)
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

"""The miniature world as training data without end: cases made in worker processes, images drawn on the GPU."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers import PreTrainedTokenizerBase

from mige.data.batch import TrainingBatch, TrainingSample, collate
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.data.synthetic import tasks
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.data.synthetic.world import FIRST, World, frame
from mige.models.instruction import tokenize, training_text
from mige.utils.images import CLIP_MEAN, CLIP_STD

_EPOCH = 1_000_000  # samples called an epoch; none is ever shown twice

Drawn = tuple[TrainingSample, tuple[Scene, ...], tuple[int, int], int, World]
"""A sample, its scenes (the target, then the references), images' height and width, the tower's side, the world."""


@dataclass(frozen=True)
class WorldBatch:
    """A batch whose images are not drawn yet."""

    batch: TrainingBatch
    scenes: Scenes  # targets and references, in the order of `TrainingBatch.pixels_PCHW`
    shape: tuple[int, int]
    vision_size: int
    world: World

    def to(self, device: torch.device) -> TrainingBatch:
        """The whole batch on the device, its images drawn there."""
        batch = self.batch.to(device)
        pixels = draw(self.scenes, device, self.shape, self.world)
        seen = vision_pixels(pixels[batch.reference_R], self.vision_size)
        return replace(batch, pixels_PCHW=pixels, vision_RCHW=seen)

    def pin_memory(self) -> "WorldBatch":
        """Called by the data loader, for fast copies to a GPU."""
        return replace(self, batch=self.batch.pin_memory(), scenes=self.scenes.pin_memory())


def vision_pixels(pixels_RCHW: Tensor, size: int) -> Tensor:
    """`images.vision_pixels` of drawn images in [-1, 1], on their device."""
    squeezed = F.resize(pixels_RCHW, [size, size], InterpolationMode.BICUBIC, antialias=True)
    mean, std = _statistics(pixels_RCHW.device)
    return ((squeezed / 2 + 0.5).clamp(0, 1) - mean) / std


@functools.cache  # a GPU would be waited for at every copy
def _statistics(device: torch.device) -> Tensor:
    return torch.tensor([CLIP_MEAN, CLIP_STD], device=device).reshape(2, 3, 1, 1)


class WorldDataset(Dataset):
    """Sample index -> a case of the world about the seen subjects; the same for the same seed, always.

    Args:
        mixture: kinds of task and their weights, as `tasks.MIXTURE`. Raises ValueError for an unknown kind.
        size: side of square images in pixels (128); `latent_shape`: of their latents.
        vision_size: side of the vision tower's images. world: whose subjects and backgrounds.
        shapes: heights and widths in pixels, one of them drawn by the seed for every `block` samples in a row, such as
            those of a micro-batch, since the images of a batch have one shape; empty: all are squares of `size`.
    """

    def __init__(
        self,
        mixture: Mapping[str, float],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        size: int,
        latent_shape: tuple[int, int, int],
        vision_size: int,
        dropout: Dropout,
        noise_levels: int,
        world: World = FIRST,
        shapes: Sequence[tuple[int, int]] = (),
        block: int = 1,
    ):
        if unknown := sorted(mixture.keys() - tasks.KINDS.keys()):
            raise ValueError(f"the world knows no task(s) {', '.join(unknown)}; known are {', '.join(tasks.KINDS)}")
        self.mixture, self.tokenizer, self.seed, self.size = dict(mixture), tokenizer, seed, size
        self.latent_shape, self.vision_size = latent_shape, vision_size
        self.dropout, self.noise_levels, self.world = dropout, noise_levels, world
        self.shapes, self.block = tuple(shapes) or ((size, size),), block

    def __len__(self) -> int:
        return _EPOCH

    def epochs(self, samples: int) -> float:
        """The epochs that so many samples of a run are."""
        return samples / _EPOCH

    def __getitem__(self, index: int) -> Drawn:
        return self.sample(index, self.case(index))

    def case(self, index: int) -> tasks.Case:
        """The case of that number."""
        rng, seen = np.random.default_rng([self.seed, index]), self.world.splits()["seen"]
        where = dict(world=self.world, frame=frame(*self.shape(index)))
        return tasks.sample(rng, seen, self.mixture, augment=True, **where)

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of that sample's images, px."""
        return self.shapes[_chosen(self.seed, index // self.block, len(self.shapes))]

    def sample(self, index: int, case: tasks.Case) -> Drawn:
        """A case with its instruction in tokens and its randomness, as `collate_world` takes it."""
        scenes, (height, width) = (case.target, *case.references), self.shape(index)
        channels, *latent = self.latent_shape
        latents = channels, height * latent[0] // self.size, width * latent[1] // self.size
        sample = TrainingSample(
            id=f"{case.kind}-{index}",
            where=f"{case.kind}-{index}",
            task=case.task,
            source=case.source,
            instruction=tokenize(training_text(case.task, case.prompt), self.tokenizer),
            vision=None,
            pixels=None,
            moments=None,
            **sample_randomness(
                sample_generator(self.seed, index),
                len(scenes),
                latents,
                self.dropout,
                self.noise_levels,
                train_timesteps=1000,
            ),
        )
        return sample, scenes, (height, width), self.vision_size, self.world


@functools.lru_cache(1024)  # as long as a case takes to make
def _chosen(seed: int, block: int, many: int) -> int:
    """Which of so many shapes a block of samples has."""
    return int(np.random.default_rng([seed, block, many]).integers(many)) if many > 1 else 0


def collate_world(drawn: Sequence[Drawn]) -> WorldBatch:
    """Samples of a `WorldDataset` -> batch. Raises ValueError if their images differ in shape."""
    samples, scenes, shapes, vision_sizes, worlds = zip(*drawn, strict=True)
    if len(set(shapes)) > 1:
        raise ValueError(f"a batch's images have one shape, got {sorted(set(shapes))}: block must be a multiple of it")
    stacked = Scenes.stack([scene for images in scenes for scene in images])
    return WorldBatch(collate(samples), stacked, shapes[0], vision_sizes[0], worlds[0])

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
from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.models.instruction import tokenize, training_text
from mige.utils.images import CLIP_MEAN, CLIP_STD

_EPOCH = 1_000_000  # samples called an epoch; none is ever shown twice

Drawn = tuple[TrainingSample, tuple[Scene, ...], int, int]
"""A sample, its scenes (the target, then the references), the side of images and of the vision tower's."""


@dataclass(frozen=True)
class WorldBatch:
    """A batch whose images are not drawn yet."""

    batch: TrainingBatch
    scenes: Scenes  # targets and references, in the order of `TrainingBatch.pixels_PCHW`
    size: int
    vision_size: int

    def to(self, device: torch.device) -> TrainingBatch:
        """The whole batch on the device, its images drawn there."""
        batch = self.batch.to(device)
        pixels = draw(self.scenes, device, self.size)
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
        size: side of the images in pixels (128); `latent_shape`: of their latents.
        vision_size: side of the vision tower's images.
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
    ):
        if unknown := sorted(mixture.keys() - tasks.KINDS.keys()):
            raise ValueError(f"the world knows no task(s) {', '.join(unknown)}; known are {', '.join(tasks.KINDS)}")
        self.mixture, self.tokenizer, self.seed, self.size = dict(mixture), tokenizer, seed, size
        self.latent_shape, self.vision_size = latent_shape, vision_size
        self.dropout, self.noise_levels = dropout, noise_levels

    def __len__(self) -> int:
        return _EPOCH

    def epochs(self, samples: int) -> float:
        """The epochs that so many samples of a run are."""
        return samples / _EPOCH

    def __getitem__(self, index: int) -> Drawn:
        return self.sample(index, self.case(index))

    def case(self, index: int) -> tasks.Case:
        """The case of that number."""
        rng, seen = np.random.default_rng([self.seed, index]), sprites.split()[0]
        return tasks.sample(rng, seen, self.mixture, augment=True)

    def sample(self, index: int, case: tasks.Case) -> Drawn:
        """A case with its instruction in tokens and its randomness, as `collate_world` takes it."""
        scenes = (case.target, *case.references)
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
                self.latent_shape,
                self.dropout,
                self.noise_levels,
                train_timesteps=1000,
            ),
        )
        return sample, scenes, self.size, self.vision_size


def collate_world(drawn: Sequence[Drawn]) -> WorldBatch:
    """Samples of a `WorldDataset` -> batch."""
    samples, scenes, sizes, vision_sizes = zip(*drawn, strict=True)
    stacked = Scenes.stack([scene for images in scenes for scene in images])
    return WorldBatch(collate(samples), stacked, sizes[0], vision_sizes[0])

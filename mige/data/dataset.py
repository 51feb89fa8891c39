"""The joint dataset: the three tasks from many files, mixed by weight, a pure function of (seed, sample counter).

A run counts its samples 0, 1, 2, ... over all processes. Which record a sample is, its noise, timestep and dropout
follow from the seed and that number alone, so a resumed run, or one on another number of GPUs, sees the same samples.

Letters: B samples, R references of all samples, C channels; latents are [4, h, w].
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from mige.data.crops import Crop, training_crops
from mige.data.records import Record
from mige.models.instruction import Instruction, tokenize, training_text
from mige.models.vae import Moments, encode, scale
from mige.tasks import Task
from mige.utils import images


class Features(Protocol):
    """A store of pre-extracted moments."""

    def read(self, crops: Sequence[Crop]) -> Moments:
        """Moments [len(crops), 4, h, w] of images, cropped so."""


@dataclass(frozen=True)
class Dropout:
    """Shares of samples that lose their text, their source, or both."""

    text: float = 0.05
    source: float = 0.05
    both: float = 0.05

    def __post_init__(self):
        if min(self.text, self.source, self.both) < 0 or self.text + self.source + self.both > 1:
            raise ValueError(f"dropout shares must be at least 0 and add up to at most 1, got {self}")

    def draw(self, p: float) -> tuple[bool, bool]:
        """(drop text, drop source) for a uniform number p: [0, text), then source, then both, then neither."""
        only_text = p < self.text
        only_source = not only_text and p < self.text + self.source
        both = not only_text and not only_source and p < self.text + self.source + self.both
        return only_text or both, only_source or both


@dataclass(frozen=True)
class Mixture:
    """Several sets of records and how often an epoch shows each record of a set: 2.0 twice, 0.5 every other epoch."""

    sets: Sequence[Sequence[Record]]
    weights: Sequence[float]

    def __post_init__(self):
        if len(self.sets) != len(self.weights) or any(weight <= 0 for weight in self.weights):
            raise ValueError(f"{len(self.sets)} sets of records need as many weights above 0, got {self.weights}")
        if len(self) == 0:
            raise ValueError("an epoch of this mixture has no samples: add records or raise the weights")

    def __len__(self) -> int:
        """Samples an epoch."""
        return sum(round(len(records) * weight) for records, weight in zip(self.sets, self.weights, strict=True))

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The epoch's samples as (set, record) numbers, int64 [len(self), 2], shuffled."""
        rng = np.random.default_rng([seed, epoch])
        chosen = []
        for number, (records, weight) in enumerate(zip(self.sets, self.weights, strict=True)):
            many = round(len(records) * weight)
            rounds = [rng.permutation(len(records)) for _ in range(-(-many // len(records)))] if many else []
            indices = np.concatenate(rounds)[:many] if rounds else np.empty(0, dtype=np.int64)
            chosen.append(np.stack([np.full(many, number), indices], axis=1))
        return rng.permutation(np.concatenate(chosen))


@dataclass(frozen=True)
class TrainingSample:
    """One sample before any network. Its pictures are the target, then the references.

    Either `pixels` (float32 [1 + R, 3, H, W] in [-1, 1]) or `moments` (of [1 + R, 4, h, w]) is given; neither, nor
    `vision`, where the pictures are drawn on the device.
    """

    id: str
    task: Task
    source: int | None  # which reference is the picture to edit
    instruction: Instruction
    vision: Tensor | None  # float32 [R, 3, 224, 224]
    pixels: Tensor | None
    moments: Moments | None
    noise: Tensor  # float32 [K, 4, h, w], of the diffusion, at K noise levels
    posterior: Tensor  # float32 [1 + R, 4, h, w]: the VAE posterior's noise of every picture
    source_posterior: Tensor  # float32 [4, h, w]: of the source
    times: tuple[int, ...]  # K of them
    drop_text: bool
    drop_source: bool


@dataclass(frozen=True)
class TrainingBatch:
    """B samples, R references and P = B + R pictures, collated; `latents` makes the rest.

    Attributes:
        pixels_PCHW, moments, vision_RCHW: as in `TrainingSample`.
        task_B: int64, places in `Task`.
        target_B, reference_R, source_B: int64, places in the row of pictures; a sample without a source has -1.
        noise_BCHW, time_B: K noise levels of every sample, the first of all samples first: [K B, ...].
    """

    ids: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    vision_RCHW: Tensor | None
    pixels_PCHW: Tensor | None
    moments: Moments | None
    noise_BCHW: Tensor
    posterior_PCHW: Tensor
    source_posterior_BCHW: Tensor
    task_B: Tensor
    target_B: Tensor
    reference_R: Tensor
    source_B: Tensor
    time_B: Tensor
    drop_text_B: Tensor
    drop_source_B: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """All tensors on the device."""
        moved = {f.name: _move(getattr(self, f.name), lambda t: t.to(device, non_blocking=True)) for f in fields(self)}
        return TrainingBatch(**moved)

    def pin_memory(self) -> "TrainingBatch":
        """Called by the data loader, for fast copies to a GPU."""
        return TrainingBatch(**{f.name: _move(getattr(self, f.name), Tensor.pin_memory) for f in fields(self)})

    def latents(self, vae: AutoencoderKL) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled targets x0 [B, 4, h, w], unscaled references [R, 4, h, w], scaled sources [B, 4, h, w] (or zeros)."""
        moments = self.moments
        if moments is None:
            with torch.no_grad():
                moments = encode(vae, self.pixels_PCHW)
                moments = Moments(moments.mean.float(), moments.std.float())
        unscaled_PCHW = moments.sample(self.posterior_PCHW)
        place_B = self.source_B.clamp(min=0)
        sources = Moments(moments.mean[place_B], moments.std[place_B]).sample(self.source_posterior_BCHW)
        has_source = (self.source_B >= 0).reshape(-1, 1, 1, 1)
        return (
            scale(vae, unscaled_PCHW[self.target_B]),
            unscaled_PCHW[self.reference_R],
            torch.where(has_source, scale(vae, sources), 0.0),
        )


def _move(value, how):
    if isinstance(value, Tensor):
        return how(value)
    return Moments(how(value.mean), how(value.std)) if isinstance(value, Moments) else value


def collate(samples: Sequence[TrainingSample]) -> TrainingBatch:
    """Samples -> batch. An edit's source takes the posterior noise of its reference: one latent serves as both."""
    target, reference, source, source_posterior, first = [], [], [], [], 0
    for sample in samples:
        target.append(first)
        reference += range(first + 1, first + len(sample.posterior))
        source.append(-1 if sample.source is None else first + 1 + sample.source)
        source_posterior.append(sample.posterior[1] if sample.task is Task.EDIT else sample.source_posterior)
        first += len(sample.posterior)
    with_moments = samples[0].moments is not None
    moments = [sample.moments for sample in samples if with_moments]
    return TrainingBatch(
        ids=tuple(sample.id for sample in samples),
        instructions=tuple(sample.instruction for sample in samples),
        vision_RCHW=_cat([sample.vision for sample in samples]),
        pixels_PCHW=_cat([sample.pixels for sample in samples]),
        moments=Moments(torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])) if moments else None,
        noise_BCHW=torch.stack([sample.noise for sample in samples], dim=1).flatten(0, 1),
        posterior_PCHW=torch.cat([sample.posterior for sample in samples]),
        source_posterior_BCHW=torch.stack(source_posterior),
        task_B=torch.tensor([list(Task).index(sample.task) for sample in samples]),
        target_B=torch.tensor(target),
        reference_R=torch.tensor(reference, dtype=torch.long),
        source_B=torch.tensor(source),
        time_B=torch.tensor([sample.times for sample in samples]).T.flatten(),
        drop_text_B=torch.tensor([sample.drop_text for sample in samples]),
        drop_source_B=torch.tensor([sample.drop_source for sample in samples]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)


class JointDataset(Dataset):
    """Sample counter -> `TrainingSample`. Stateless but for a cache of the epoch's order; safe in worker processes.

    Args:
        mixture: records (with targets) and their weights.
        tokenizer: of the text encoder.
        size: side of the square pictures in pixels (512); `latent_shape`: of their latents (4, 64, 64).
        vision_size: side of the vision tower's pictures (224).
        features: a store of moments; None to return pixels, for the VAE to encode in the training step.
        train_timesteps: T; times are drawn uniformly from 0..T-1. noise_levels: times a sample.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        size: int,
        latent_shape: tuple[int, int, int],
        vision_size: int,
        features: Features | None = None,
        dropout: Dropout | None = None,
        noise_levels: int = 1,
        train_timesteps: int = 1000,
    ):
        for records in mixture.sets:
            for record in records:
                if record.target is None:
                    raise ValueError(f'{record.where}: no target picture; training needs the field "image"')
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.size, self.latent_shape, self.vision_size = size, latent_shape, vision_size
        self.features, self.dropout = features, dropout or Dropout()
        self.noise_levels, self.train_timesteps = noise_levels, train_timesteps
        self._epoch, self._order = -1, None

    def __len__(self) -> int:
        """Samples an epoch; counters run on beyond it."""
        return len(self.mixture)

    def record(self, counter: int) -> Record:
        """The record that sample `counter` of the run shows."""
        epoch, place = divmod(counter, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.mixture.order(self.seed, epoch)
        number, index = self._order[place]
        return self.mixture.sets[number][index]

    def __getitem__(self, counter: int) -> TrainingSample:
        record = self.record(counter)
        crops = training_crops(record)
        chance = draw_chance(
            sample_generator(self.seed, counter),
            len(crops),
            self.latent_shape,
            self.dropout,
            self.noise_levels,
            self.train_timesteps,
        )
        pictures = {path: images.open_image(path) for path in dict.fromkeys(record.references)}
        pixels = moments = None
        if self.features is not None:
            moments = self.features.read(crops)
        else:
            opened = {record.target: pictures.get(record.target) or images.open_image(record.target)} | pictures
            pixels = torch.stack([self._pixels(opened[path], opened[like or path].size) for path, like in crops])
        return TrainingSample(
            record.id,
            record.task,
            None if record.source is None else record.references.index(record.source),
            tokenize(training_text(record.task, record.prompt, record.edit_type), self.tokenizer),
            torch.stack([images.vision_pixels(pictures[path], self.vision_size) for path in record.references]),
            pixels,
            moments,
            **chance,
        )

    def _pixels(self, picture: images.Image.Image, like: tuple[int, int]) -> Tensor:
        return images.to_pixels(images.center_crop(picture, self.size, self.size, like=like))


def draw_chance(
    generator: torch.Generator,
    pictures: int,
    latent_shape: tuple[int, int, int],
    dropout: Dropout,
    noise_levels: int,
    train_timesteps: int,
) -> dict:
    """A sample's random numbers, by the names of `TrainingSample`'s fields, in a fixed order."""
    times = [int(torch.randint(train_timesteps, (), generator=generator))]
    drop_text, drop_source = dropout.draw(float(torch.rand((), generator=generator)))
    noise, source_posterior, *posterior = torch.randn(2 + pictures, *latent_shape, generator=generator)
    levels = [noise]
    for _ in range(noise_levels - 1):
        times.append(int(torch.randint(train_timesteps, (), generator=generator)))
        levels.append(torch.randn(latent_shape, generator=generator))
    return dict(
        noise=torch.stack(levels),
        posterior=torch.stack(posterior),
        source_posterior=source_posterior,
        times=tuple(times),
        drop_text=drop_text,
        drop_source=drop_source,
    )


class Counters(Sampler[list[int]]):
    """The sample counters of one process, a list a micro-batch, from optimiser step `start` on, for ever.

    A step takes `batch * processes * accumulate` consecutive counters, whatever they are split into.
    """

    def __init__(self, *, batch: int, processes: int, rank: int, accumulate: int, start: int):
        self.batch, self.processes, self.rank, self.accumulate, self.start = batch, processes, rank, accumulate, start

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start * self.accumulate
        while True:
            first = (micro * self.processes + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            micro += 1


def sample_generator(seed: int, counter: int) -> torch.Generator:
    """The CPU generator of one sample of a run."""
    digest = hashlib.sha256(f"train:{seed}:{counter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)

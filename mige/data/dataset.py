"""The joint dataset: the three tasks from many files, mixed by weight, a pure function of (seed, sample index).

A run counts its samples 0, 1, 2, ... over all processes. Which record a sample is (mige/data/order.py), its noise,
timestep and dropout (mige/data/randomness.py) follow from the seed and that number alone, so a resumed run, or one on
another number of GPUs, sees the same samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mige.data.batch import TrainingSample
from mige.data.crops import Crop, training_crops
from mige.data.mapped_records import MappedRecords
from mige.data.order import SampleOrder
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.data.records import BadRecordsError, Record
from mige.data.shape_order import ShapeOrder
from mige.data.shapes import ShapedRecords
from mige.models.instruction import tokenize, training_text
from mige.models.vae import Moments
from mige.utils import images
from mige.utils.settings import ConfigError, positive_fraction


class Features(Protocol):
    """A store of pre-extracted moments."""

    def read(self, crops: Sequence[Crop]) -> Moments:
        """Moments [len(crops), 4, h, w] of images, cropped so."""


@dataclass(frozen=True)
class Mixture:
    """Several sets of records and how often an epoch shows each record of a set: 2.0 twice, 0.5 every other epoch.

    `weights`: numbers, or fractions as text ("1/3"). Raises ConfigError for weights that are not one a set and above 0,
    BadRecordsError for a set without records.
    """

    sets: Sequence[Sequence[Record]]
    weights: Sequence[float | str]

    def __post_init__(self):
        if len(self.sets) != len(self.weights) or not self.sets:
            raise ConfigError(f"{len(self.sets)} sets of records and {len(self.weights)} weights, expected one a set")
        for number, (records, weight) in enumerate(zip(self.sets, self.weights, strict=True)):
            positive_fraction(f"the weight of set {number}", weight if isinstance(weight, str) else float(weight))
            if len(records) == 0:
                raise BadRecordsError(f"set {number} has no records: add some, or leave the set out")


class JointDataset(Dataset):
    """Sample index -> `TrainingSample`. Stateless, so safe in worker processes.

    Args:
        mixture: records (with targets) and their weights.
        tokenizer: of the text encoder.
        size: side of square images in pixels (512); `latent_shape`: of their latents (4, 64, 64).
        vision_size: side of the vision tower's images in pixels (224).
        shaped: which record is shown in which shape; None: all images are squares.
        features: a store of moments for each shape, by height and width in pixels; None to return pixels, for the VAE
            to encode in the training step.
        train_timesteps: T; times are drawn uniformly from 0..T-1. noise_levels: times a sample.

    Raises BadRecordsError for a record without a target, naming set, file and record.
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
        shaped: ShapedRecords | None = None,
        features: Mapping[tuple[int, int], Features] | None = None,
        dropout: Dropout | None = None,
        noise_levels: int = 1,
        train_timesteps: int = 1000,
    ):
        for number, records in enumerate(mixture.sets):
            for record in () if isinstance(records, MappedRecords) and records.fit else records:
                if record.target is None:
                    raise BadRecordsError(
                        f'set {number}, {record.where}: no target, the field "image"; training needs one'
                    )
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.size, self.latent_shape, self.vision_size = size, latent_shape, vision_size
        self.features, self.dropout = features, dropout or Dropout()
        self.noise_levels, self.train_timesteps = noise_levels, train_timesteps
        self.shaped = shaped
        if shaped is None:
            self.order = SampleOrder([len(records) for records in mixture.sets], mixture.weights, seed)
        else:
            self.order = ShapeOrder(shaped.of_sets, mixture.weights, seed, shaped.block)

    def __len__(self) -> int:
        """Samples of the longest epoch; sample indices run on beyond it."""
        return ceil(self.order.epoch_samples)

    def epochs(self, samples: int) -> float:
        """The epochs that so many samples of a run are."""
        return float(samples / self.order.epoch_samples)

    def record(self, index: int) -> Record:
        """The record that sample `index` of the run shows."""
        number, place = self.order.locate(index)
        return self.mixture.sets[number][place]

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of that sample's images, px."""
        if self.shaped is None:
            return self.size, self.size
        number, place = self.order.locate(index)
        return self.shaped.sizes[self.shaped.of_sets[number][place]]

    def __getitem__(self, index: int) -> TrainingSample:
        record, (height, width) = self.record(index), self.shape(index)
        crops = training_crops(record)
        channels, *latent = self.latent_shape
        randomness = sample_randomness(
            sample_generator(self.seed, index),
            len(crops),
            (channels, height * latent[0] // self.size, width * latent[1] // self.size),
            self.dropout,
            self.noise_levels,
            self.train_timesteps,
        )
        opened = {path: images.open_image(path) for path in dict.fromkeys(record.references)}
        pixels = moments = None
        if self.features is not None:
            moments = self.features[height, width].read(crops)
        else:
            opened[record.target] = opened.get(record.target) or images.open_image(record.target)
            cut = [
                images.center_crop(opened[path], height, width, like=opened[like or path].size) for path, like in crops
            ]
            pixels = torch.stack([images.to_pixels(image) for image in cut])
        return TrainingSample(
            record.id,
            record.where,
            record.task,
            None if record.source is None else record.references.index(record.source),
            tokenize(training_text(record.task, record.prompt, record.edit_type), self.tokenizer),
            self._vision([opened[path] for path in record.references]),
            pixels,
            moments,
            **randomness,
        )

    def _vision(self, references: Sequence[images.Image.Image]) -> Tensor:
        """[R, 3, vision_size, vision_size]; R may be 0."""
        if not references:
            return torch.zeros(0, 3, self.vision_size, self.vision_size)
        return torch.stack([images.vision_pixels(image, self.vision_size) for image in references])

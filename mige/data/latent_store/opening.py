"""Opening images for extraction in worker processes: files -> levels, some of them at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mige.data.crops import Crop
from mige.data.latent_store.entries import FileFacts
from mige.data.latent_store.meta import Meta
from mige.utils import images
from mige.utils.images import BadImageError


@dataclass(frozen=True)
class Job:
    """An image to encode. like: width and height of the image that it is cropped like."""

    crop: Crop
    key: bytes
    like: tuple[int, int] | None


@dataclass(frozen=True)
class Opened:
    """An opened image, uint8 [H, W, 3], its width and height before, and its file; or why it was not opened."""

    job: Job
    file: FileFacts | None = None
    size: tuple[int, int] | None = None
    levels: Tensor | None = None
    error: BadImageError | None = None


@dataclass(frozen=True)
class Chunk:
    """Images that go through the VAE together, without their levels, which are uint8 [chunk, H, W, 3], filled up."""

    images: list[Opened]
    failed: list[Opened]
    levels: Tensor

    def pin_memory(self) -> Self:
        """What DataLoader calls, so that the copy to a GPU can run beside its work."""
        return replace(self, levels=self.levels.pin_memory())


class _Images(Dataset):
    def __init__(self, jobs: Sequence[Job], meta: Meta):
        self.jobs, self.fitted = jobs, (meta.height, meta.width)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> Opened:
        job = self.jobs[index]
        path = job.crop.path
        try:
            file = FileFacts.of(path)  # before it is opened: should it be replaced meanwhile, it counts as changed
            image = images.open_image(path)
            levels = images.to_levels(images.center_crop(image, *self.fitted, like=job.like))
        except BadImageError as error:
            return Opened(job, error=error)
        except OSError as error:
            hint = "correct the path or its permissions, or fetch the image"
            return Opened(job, error=BadImageError(path, f"cannot be read ({error.strerror})", hint))
        return Opened(job, file, image.size, levels)


def open_chunks(jobs: Sequence[Job], meta: Meta, chunk: int, workers: int, *, pinned: bool = False) -> DataLoader:
    """Chunks of the jobs' images, in order. Levels travel as bytes, a quarter of what float32 pixels take."""
    collate = partial(_collate, chunk)
    return DataLoader(_Images(jobs, meta), chunk, num_workers=workers, collate_fn=collate, pin_memory=pinned)


def _collate(chunk: int, opened: list[Opened]) -> Chunk:
    good = [image for image in opened if image.error is None]
    levels = good[0].levels.new_zeros(chunk, *good[0].levels.shape) if good else torch.empty(0, dtype=torch.uint8)
    for place, image in zip(levels, good, strict=False):
        place.copy_(image.levels)
    failed = [image for image in opened if image.error]
    return Chunk([replace(image, levels=None) for image in good], failed, levels)

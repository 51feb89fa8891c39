"""The official layout of pre-extracted moments: a .npy file an image. Read only."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mige.data.crops import Crop, as_crops
from mige.data.latent_store.errors import StoreError
from mige.models.vae import Moments
from mige.utils.files import absolute
from mige.utils.images import image_size
from mige.utils.pixels import covering


class NpyFolder:
    """The official layout: `<stem of the image>.npy`, float32 [2C, h, w], mean then std.

    It does not say which VAE and crop made it, nor what the image's file was like. Every image has one crop, its own:
    `missing`, given all images of a run, refuses those that are to be cropped like another of another shape, and two
    images of one stem, which would share a file; so does `read`, of the latter, among the images it has seen.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], size: tuple[int, int]):
        """shape: of a mean, [C, h, w]; size: height and width of the images in training, px."""
        self.folder, self.shape, self.size = folder, shape, size
        self._owners: dict[str, str] = {}  # stem -> the image it stands for

    def read(self, images: Sequence[Path | Crop]) -> Moments:
        """As `FeatureStore.read`; raises StoreError also for a file of another shape or dtype and for shared stems."""
        rows = [self._load(crop.path) for crop in as_crops(images)]
        joined = torch.stack(rows) if rows else torch.zeros(0, 2, *self.shape)
        return Moments(*joined.unbind(1))

    def missing(self, images: Iterable[Path | Crop]) -> list[Path | Crop]:
        """Those of the images without a file.

        Raises StoreError if two images have one stem, if the first that is there has another shape or dtype, and for
        an image that is to be cropped like another of another shape: reads the headers of both.
        """
        names = set(os.listdir(self.folder))  # noqa: PTH208 - names only, of perhaps millions
        images = list(images)
        crops = as_crops(images)
        there = [self._file(crop.path).name in names for crop in crops]
        if True in there:
            self._load(crops[there.index(True)].path)
        with ThreadPoolExecutor(16) as pool:
            for _ in pool.map(self._refuse_pair, [crop for crop in crops if crop.like is not None]):
                pass
        return [image for image, is_there in zip(images, there, strict=True) if not is_there]

    def changed(self, images: Iterable[Path | Crop]) -> list[Path | Crop]:
        """None: the layout does not say what the images' files were like."""
        return []

    def _refuse_pair(self, crop: Crop) -> None:
        own, like = image_size(crop.path), image_size(crop.like)
        if covering(own, *self.size) != covering(like, *self.size):
            raise StoreError(
                f"{self.folder}: {crop.path} is {own[0]} x {own[1]} and is to be cropped like its target {crop.like}, "
                f"{like[0]} x {like[1]}, but a .npy folder holds each image cropped by its own shape; "
                "extract into a store with tools/extract_features.py"
            )

    def _load(self, path: Path) -> Tensor:
        file = self._file(path)
        try:
            moments = np.load(file, allow_pickle=False)
        except FileNotFoundError as error:
            raise StoreError(f"{file}: no such file, for image {path}; extract it") from error
        except (ValueError, EOFError) as error:
            raise StoreError(f"{file}, of image {path}: damaged ({error}); extract it again") from error
        expected = (2 * self.shape[0], *self.shape[1:])
        if not isinstance(moments, np.ndarray) or moments.dtype != np.float32 or moments.shape != expected:
            got = f"{moments.dtype} {list(moments.shape)}" if isinstance(moments, np.ndarray) else "an archive"
            raise StoreError(
                f"{file}, of image {path}: {got}, expected float32 {list(expected)} (mean, std); "
                "use the size and the VAE that it was extracted with"
            )
        return torch.from_numpy(moments.reshape(2, *self.shape))

    def _file(self, path: Path) -> Path:
        image, stem = absolute(path), Path(path).stem
        if (owner := self._owners.setdefault(stem, image)) != image:
            raise StoreError(
                f"{self.folder}: {owner} and {image} would share {stem}.npy, so one of them has the other's moments; "
                "extract into a store with tools/extract_features.py"
            )
        return self.folder / f"{stem}.npy"

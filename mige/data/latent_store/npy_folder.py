"""The official layout of pre-extracted moments: a .npy file a picture. Read only."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mige.data.latent_store.errors import StoreError
from mige.models.vae import Moments
from mige.utils.files import absolute


class NpyFolder:
    """The official layout: `<stem of the picture>.npy`, float32 [2C, h, w], mean then std. Read only.

    It does not say which VAE and crop made it. Two pictures of one stem would share a file: `missing`, given all
    pictures of a run, refuses that, as does `read` among the pictures it has seen.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]):
        self.folder, self.shape = folder, shape
        self._owners: dict[str, str] = {}  # stem -> the picture it stands for

    def read(self, paths: Sequence[Path]) -> Moments:
        """As `FeatureStore.read`; raises StoreError also for a file of another shape or dtype and for shared stems."""
        rows = [self._load(path) for path in paths]
        joined = torch.stack(rows) if rows else torch.zeros(0, 2, *self.shape)
        return Moments(*joined.unbind(1))

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the pictures without a file.

        Raises StoreError if two pictures have one stem, and if the first that is there has another shape or dtype.
        """
        names = set(os.listdir(self.folder))  # noqa: PTH208 - names only, of perhaps millions
        paths = list(paths)
        there = [self._file(path).name in names for path in paths]
        if True in there:
            self._load(paths[there.index(True)])
        return [path for path, is_there in zip(paths, there, strict=True) if not is_there]

    def _load(self, path: Path) -> Tensor:
        file = self._file(path)
        try:
            moments = np.load(file, allow_pickle=False)
        except FileNotFoundError as error:
            raise StoreError(f"{file}: no such file, for picture {path}; extract it") from error
        except (ValueError, EOFError) as error:
            raise StoreError(f"{file}, of picture {path}: damaged ({error}); extract it again") from error
        expected = (2 * self.shape[0], *self.shape[1:])
        if not isinstance(moments, np.ndarray) or moments.dtype != np.float32 or moments.shape != expected:
            got = f"{moments.dtype} {list(moments.shape)}" if isinstance(moments, np.ndarray) else "an archive"
            raise StoreError(
                f"{file}, of picture {path}: {got}, expected float32 {list(expected)} (mean, std); "
                "use the size and the VAE that it was extracted with"
            )
        return torch.from_numpy(moments.reshape(2, *self.shape))

    def _file(self, path: Path) -> Path:
        picture, stem = absolute(path), Path(path).stem
        if (owner := self._owners.setdefault(stem, picture)) != picture:
            raise StoreError(
                f"{self.folder}: {owner} and {picture} would share {stem}.npy, so one of them has the other's moments; "
                "extract into a store with tools/extract_features.py"
            )
        return self.folder / f"{stem}.npy"

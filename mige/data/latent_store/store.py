"""The store of pre-extracted VAE moments, so that training need not encode the same images at every step.

A store is a folder of one `meta.json` (what decides the moments: size, fit, VAE) and any number of parts. A part is
written by one process in one go and has two files: `<name>.rows`, the moments one after the other, and `<name>.index`,
an entry a row in the same order. Nobody writes into another's part, so no locks are needed, and parts of several
machines may be copied into one folder. An entry is written after its row has reached the disk, and counts only if both
are whole: what a kill cut off is extracted again.

The official layout (`NpyFolder`: a .npy file an image) is read through the same two methods, `read` and `missing`.

Letters: B images, C latent channels (4); moments are [B, C, h, w].
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from mige.data.crops import Crop, as_crops
from mige.data.latent_store.entries import ENTRY, PLACED, checksum, is_unchanged, newest
from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.meta import DTYPES, Meta, fingerprint, make_meta, read_meta, require_equal
from mige.data.latent_store.npy_folder import NpyFolder
from mige.models.vae import Moments
from mige.utils.files import absolute
from mige.utils.pixels import covering

__all__ = ["DTYPES", "ENTRY", "FeatureStore", "NpyFolder", "StoreError", "create_store", "fingerprint", "open_store"]


def open_store(
    folder: Path, *, vae: AutoencoderKL, size: int | tuple[int, int], root: Path | None = None
) -> "FeatureStore | NpyFolder":
    """The store in `folder`, ready for reading: ours if it has a meta.json, else the official .npy layout.

    Args:
        vae: the one that training uses; it must be the one that made the store (a .npy folder cannot tell).
        size: of training's images in pixels, a side or (height, width).
        root: the folder that paths are taken relative to, if the images have moved since they were extracted.

    Raises StoreError if there is no store, if it is damaged, and if it was made with another VAE, size or fit.
    """
    expected = make_meta(vae, size)
    if (folder / "meta.json").is_file():
        meta = read_meta(folder)
        require_equal(folder, meta, replace(expected, dtype=meta.dtype, precision=meta.precision))
        return FeatureStore(folder, meta, root)
    if next(folder.glob("*.npy"), None):
        return NpyFolder(folder, expected.shape, (expected.height, expected.width))
    raise StoreError(f"{folder}: no meta.json and no .npy file, so no store; make one with tools/extract_features.py")


def create_store(
    folder: Path,
    *,
    vae: AutoencoderKL,
    size: int | tuple[int, int],
    root: Path,
    dtype: str = "float32",
    precision: str = "float32",
) -> "FeatureStore":
    """The store in `folder` to extract into, made if it is not there. Several processes may call this at once.

    root: the folder that paths are taken relative to; a store that is there already keeps its own.
    dtype: of the stored values, "float32" (exact) or "float16" (half the bytes, relative error up to 2^-11).
    precision: that the VAE encodes in, "float32" or "bfloat16" (see `encoding.psnr`); the VAE comes in float32.
    Raises StoreError if a store with another VAE, size, fit, dtype or precision is there.
    """
    meta = replace(make_meta(vae, size), dtype=dtype, precision=precision, root=absolute(root))
    folder.mkdir(parents=True, exist_ok=True)
    tmp = folder / f".{secrets.token_hex(8)}.part"
    try:
        tmp.write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        os.link(tmp, folder / "meta.json")  # whole or not at all, and only one of several processes succeeds
    except FileExistsError:
        pass  # compared below
    finally:
        tmp.unlink(missing_ok=True)
    found = read_meta(folder)
    require_equal(folder, found, meta)
    return FeatureStore(folder, found)


class FeatureStore:
    """Moments by the path of their image and by its crop. Holds no open file, so it may be forked and pickled.

    An image is known by its path relative to the root (`root`, by default the one in meta.json), compared as text:
    links are not followed and the disk is not touched. Cropped like another image, it has a row of its own, known by
    its path and by the shape that both are scaled to. What is added after opening is not seen.

    Raises StoreError if the root in meta.json is no folder any more and none is given.
    """

    def __init__(self, folder: Path, meta: Meta, root: Path | None = None):
        if root is None and not Path(meta.root).is_dir():
            raise StoreError(
                f"{folder}: its images lay below {meta.root}, which is gone; if they moved, "
                'open the store with their new root or write it to "root" in meta.json'
            )
        self.folder, self.meta = folder, meta
        self.root = absolute(meta.root if root is None else root)
        self._parts = sorted(folder.glob("*.index"))
        self._entries = newest([self._whole_entries(number) for number in range(len(self._parts))])
        self._keys = np.ascontiguousarray(self._entries["key"])  # searchsorted would copy a field at every call

    def __len__(self) -> int:
        """How many rows it holds, one an image and crop."""
        return len(self._keys)

    @property
    def bytes_on_disk(self) -> int:
        """Of all files, replaced and half-written rows included."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def read(self, images: Sequence[Path | Crop]) -> Moments:
        """The moments of these images, float32 [B, C, h, w], in the order given.

        Raises StoreError naming the image if one is not there or its row is damaged, OSError if reading fails.
        """
        crops = as_crops(images)
        found = self._find(crops)
        if (found < 0).any():
            absent = [crop for crop, at in zip(crops, found, strict=True) if at < 0]
            raise StoreError(
                f"{self.folder} lacks {len(absent)} of {len(crops)} images, the first {absent[0]} "
                f"({self._relative(absent[0].path)!r} from the root {self.root}): run tools/extract_features.py on the "
                "same records again, or give the root that the images moved to"
            )
        rows = np.empty((len(crops), *self.meta.row), DTYPES[self.meta.dtype])
        for crop, entry, row in zip(crops, self._entries[found], rows, strict=True):
            self._read_row(crop.path, entry, row)
        return Moments(*torch.from_numpy(rows).float().unbind(1))

    def missing(self, images: Iterable[Path | Crop]) -> list[Path | Crop]:
        """Those of the images that are not in the store, so cropped; touches no file."""
        images = list(images)
        return [image for image, at in zip(images, self._find(as_crops(images)), strict=True) if at < 0]

    def changed(self, images: Iterable[Path | Crop]) -> list[Path | Crop]:
        """Those in the store whose file is gone or holds something else than when it was extracted.

        Asks the disk for every image's size and time, in threads, and reads the content only where the time alone
        differs (the data was copied).
        """
        images = list(images)
        found = self._find(as_crops(images))
        there = [(image, self._entries[at]) for image, at in zip(images, found, strict=True) if at >= 0]
        paths = [image.path if isinstance(image, Crop) else image for image, _ in there]
        with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many at once
            same = list(pool.map(is_unchanged, paths, [entry for _, entry in there], chunksize=256))
        return [image for (image, _), kept in zip(there, same, strict=True) if not kept]

    def image_sizes(self, paths: Sequence[Path]) -> dict[Path, tuple[int, int]]:
        """Width and height, px, of those of the images that are in the store, cropped by their own shape."""
        found = zip(paths, self._search([self.key(path) for path in paths]), strict=True)
        return {path: self._size_of(self._entries[at]) for path, at in found if at >= 0}

    def key(self, path: Path, like: tuple[int, int] | None = None) -> bytes:
        """The 16 bytes that stand for an image and its crop in the index; two of them share them by chance once in
        10^25 stores of five million. like: width and height of the image that it is cropped like."""
        # Keyed by the shape that both are scaled to: images of several sizes and one ratio share a row.
        crop = b"" if like is None else b"\0%d x %d" % covering(like, self.meta.height, self.meta.width)
        return hashlib.blake2b(os.fsencode(self._relative(path)) + crop, digest_size=16).digest()

    def _read_row(self, path: Path, entry: np.void, row: np.ndarray) -> None:
        # Not memory-mapped: from a cold disk that is 12 times slower (a fault a few pages), and an I/O error kills.
        file = self._parts[entry["part"]].with_suffix(".rows")
        with file.open("rb") as rows:
            rows.seek(int(entry["row"]) * row.nbytes)
            got = rows.readinto(row)
        if got != row.nbytes or checksum(entry, row) != entry["crc"]:
            raise StoreError(
                f"{file}, row {entry['row']}, of image {path}: damaged; delete this file and its .index, then run "
                "tools/extract_features.py again"
            )

    def _find(self, crops: Sequence[Crop]) -> np.ndarray:
        """Positions in the sorted index, int64 [B]; -1 for an image that is not there."""
        sizes = self.image_sizes(list({crop.like for crop in crops if crop.like is not None}))
        known = np.array([like is None or like in sizes for _, like in crops], bool)
        return np.where(known, self._search([self.key(path, sizes.get(like)) for path, like in crops]), -1)

    def _search(self, keys: Sequence[bytes]) -> np.ndarray:
        """Where keys are in the sorted index, int64 [len(keys)], or -1."""
        wanted = np.array(keys, self._keys.dtype)
        if not len(self._keys):
            return np.full(len(wanted), -1)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, at, -1)

    def _size_of(self, entry: np.void) -> tuple[int, int]:
        size = int(entry["width"]), int(entry["height"])
        if min(size) < 1:
            raise StoreError(
                f"{self._parts[entry['part']]}, entry {entry['row']}: damaged (an image of {size[0]} x {size[1]}); "
                "delete this file and its .rows, then run tools/extract_features.py again"
            )
        return size

    def _relative(self, path: Path) -> str:
        whole, prefix = absolute(path), self.root.rstrip("/") + "/"
        return whole[len(prefix) :] if whole.startswith(prefix) else os.path.relpath(whole, self.root)

    def _whole_entries(self, number: int) -> np.ndarray:
        """The entries of a part that are whole and whose rows are, with their places."""
        index = self._parts[number]
        rows = index.with_suffix(".rows")
        rows_bytes = rows.stat().st_size if rows.exists() else 0
        count = min(index.stat().st_size // ENTRY.itemsize, rows_bytes // self.meta.row_bytes)
        entries = np.fromfile(index, ENTRY, count)
        placed = np.empty(count, PLACED)
        for name in ENTRY.names:
            placed[name] = entries[name]
        placed["part"], placed["row"] = number, np.arange(count)
        return placed

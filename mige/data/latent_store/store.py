"""The store of pre-extracted VAE moments, so that training need not encode the same pictures at every step.

A store is a folder of one `meta.json` (what decides the moments: size, fit, VAE) and any number of parts. A part is
written by one process in one go and has two files: `<name>.rows`, the moments one after the other, and `<name>.index`,
an entry a row in the same order. Nobody writes into another's part, so no locks are needed, and parts of several
machines may be copied into one folder. An entry is written after its row has reached the disk, and counts only if both
are whole: what a kill cut off is extracted again.

The official layout (`NpyFolder`: a .npy file a picture) is read through the same two methods, `read` and `missing`.

Letters: B pictures, C latent channels (4); moments are [B, C, h, w].
"""

import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from mige.data.latent_store.entries import ENTRY, PLACED, is_unchanged, newest
from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.meta import DTYPES, Meta, fingerprint, make_meta, read_meta, require_equal
from mige.data.latent_store.npy_folder import NpyFolder
from mige.models.vae import Moments
from mige.utils.files import absolute

__all__ = ["DTYPES", "ENTRY", "FeatureStore", "NpyFolder", "StoreError", "create_store", "fingerprint", "open_store"]


def open_store(
    folder: Path, *, vae: AutoencoderKL, size: int | tuple[int, int], root: Path | None = None
) -> "FeatureStore | NpyFolder":
    """The store in `folder`, ready for reading: ours if it has a meta.json, else the official .npy layout.

    Args:
        vae: the one that training uses; it must be the one that made the store (a .npy folder cannot tell).
        size: of training's pictures in pixels, a side or (height, width).
        root: the folder that paths are taken relative to, if the pictures have moved since they were extracted.

    Raises StoreError if there is no store, if it is damaged, and if it was made with another VAE, size or fit.
    """
    expected = make_meta(vae, size)
    if (folder / "meta.json").is_file():
        meta = read_meta(folder)
        require_equal(folder, meta, replace(expected, dtype=meta.dtype))
        return FeatureStore(folder, meta, root)
    if next(folder.glob("*.npy"), None):
        return NpyFolder(folder, expected.shape)
    raise StoreError(f"{folder}: no meta.json and no .npy file, so no store; make one with tools/extract_features.py")


def create_store(
    folder: Path, *, vae: AutoencoderKL, size: int | tuple[int, int], root: Path, dtype: str = "float32"
) -> "FeatureStore":
    """The store in `folder` to extract into, made if it is not there. Several processes may call this at once.

    root: the folder that paths are taken relative to; a store that is there already keeps its own.
    dtype: of the stored values, "float32" (exact) or "float16" (half the bytes, relative error up to 2^-11).
    Raises StoreError if a store with another VAE, size, fit or dtype is there.
    """
    meta = replace(make_meta(vae, size), dtype=dtype, root=absolute(root))
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{secrets.token_hex(8)}.part"
    try:
        beside.write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        os.link(beside, folder / "meta.json")  # whole or not at all, and only one of several processes succeeds
    except FileExistsError:
        pass  # compared below
    finally:
        beside.unlink(missing_ok=True)
    found = read_meta(folder)
    require_equal(folder, found, meta)
    return FeatureStore(folder, found)


class FeatureStore:
    """Moments by the path of their picture. Holds no open file, so it may be forked and pickled.

    A picture is known by its path relative to the root (`root`, by default the one in meta.json), compared as text:
    links are not followed and the disk is not touched. What is added after opening is not seen.

    Raises StoreError if the root in meta.json is no folder any more and none is given.
    """

    def __init__(self, folder: Path, meta: Meta, root: Path | None = None):
        if root is None and not Path(meta.root).is_dir():
            raise StoreError(
                f"{folder}: its pictures lay below {meta.root}, which is gone; if they moved, "
                'open the store with their new root or write it to "root" in meta.json'
            )
        self.folder, self.meta = folder, meta
        self.root = absolute(meta.root if root is None else root)
        self._parts = sorted(folder.glob("*.index"))
        self._entries = newest([self._whole_entries(number) for number in range(len(self._parts))])
        self._keys = np.ascontiguousarray(self._entries["key"])  # searchsorted would copy a field at every call

    def __len__(self) -> int:
        """How many pictures it holds."""
        return len(self._keys)

    @property
    def bytes_on_disk(self) -> int:
        """Of all files, replaced and half-written rows included."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def read(self, paths: Sequence[Path]) -> Moments:
        """The moments of these pictures, float32 [B, C, h, w], in the order given.

        Raises StoreError naming the picture if one is not there or its row is damaged, OSError if reading fails.
        """
        found = self._find(paths)
        if (found < 0).any():
            absent = [path for path, at in zip(paths, found, strict=True) if at < 0]
            raise StoreError(
                f"{self.folder} lacks {len(absent)} of {len(paths)} pictures, the first {absent[0]} "
                f"({self._relative(absent[0])!r} from the root {self.root}): run tools/extract_features.py on the "
                "same records again, or give the root that the pictures moved to"
            )
        rows = np.empty((len(paths), *self.meta.row), DTYPES[self.meta.dtype])
        for path, entry, row in zip(paths, self._entries[found], rows, strict=True):
            self._read_row(path, entry, row)
        return Moments(*torch.from_numpy(rows).float().unbind(1))

    def missing(self, paths: Iterable[Path]) -> list[Path]:
        """Those of the pictures that are not in the store; touches no file."""
        paths = list(paths)
        return [path for path, at in zip(paths, self._find(paths), strict=True) if at < 0]

    def changed(self, paths: Iterable[Path]) -> list[Path]:
        """Those in the store whose file is gone or holds something else than when it was extracted.

        Asks the disk for every picture's size and time, and reads the content only where the time alone differs (the
        data was copied).
        """
        paths = list(paths)
        there = [(path, self._entries[at]) for path, at in zip(paths, self._find(paths), strict=True) if at >= 0]
        return [path for path, entry in there if not is_unchanged(path, entry)]

    def _read_row(self, path: Path, entry: np.void, row: np.ndarray) -> None:
        # Not memory-mapped: from a cold disk that is 12 times slower (a fault a few pages), and an I/O error kills.
        file = self._parts[entry["part"]].with_suffix(".rows")
        with file.open("rb") as rows:
            rows.seek(int(entry["row"]) * row.nbytes)
            got = rows.readinto(row)
        if got != row.nbytes or zlib.crc32(row) != entry["crc"]:
            raise StoreError(
                f"{file}, row {entry['row']}, of picture {path}: damaged; delete this file and its .index, then run "
                "tools/extract_features.py again"
            )

    def _find(self, paths: Sequence[Path]) -> np.ndarray:
        """Positions in the sorted index, int64 [B]; -1 for a picture that is not there."""
        keys = np.array([self.key(path) for path in paths], self._keys.dtype)
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, at, -1)

    def key(self, path: Path) -> bytes:
        """The 16 bytes that stand for a picture in the index; two pictures share them by chance once in 10^25 stores
        of five million."""
        return hashlib.blake2b(os.fsencode(self._relative(path)), digest_size=16).digest()

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

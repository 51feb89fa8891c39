"""Writing: a part of a store, made by one process."""

import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from mige.data.latent_store.entries import ENTRY, FileFacts
from mige.data.latent_store.store import FeatureStore


class PartWriter:
    """A new part of a store, of a name nobody else uses; its files are made with the first rows."""

    def __init__(self, store: FeatureStore, process: int):
        self.store, self.files = store, None
        self.path = store.folder / f"{process:05d}-{time.time_ns():x}-{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for file in self.files or ():
            file.close()

    def add(self, pictures: Sequence[tuple[Path, FileFacts]], rows: np.ndarray) -> None:
        """Append rows [len(pictures), 2, C, h, w] and, once they are on the disk, their entries."""
        if not pictures:
            return
        entries = np.array([self._entry(*picture, row) for picture, row in zip(pictures, rows, strict=True)], ENTRY)
        # Unbuffered: a failed write must not be tried again when the file is closed.
        self.files = self.files or [self.path.with_suffix(end).open("xb", buffering=0) for end in (".rows", ".index")]
        for file, data in zip(self.files, (rows, entries), strict=True):
            try:
                _write(file, data.tobytes())
            except OSError as error:
                raise OSError(error.errno, f"cannot write moments: {error.strerror}", file.name) from error

    def _entry(self, path: Path, file: FileFacts, row: np.ndarray) -> tuple:
        return (
            *(self.store.key(path), file.size, file.mtime, file.digest),
            *(time.time_ns(), zlib.crc32(np.ascontiguousarray(row))),
        )


def _write(file, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())

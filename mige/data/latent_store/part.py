"""Writing: a part of a store, made by one process."""

import os
import secrets
import time
from pathlib import Path
from typing import Self

import numpy as np


class PartWriter:
    """A new part of a store, of a name nobody else uses; its files are made with the first rows."""

    def __init__(self, folder: Path, process: int):
        self.files, self.failure = None, None
        self.path = folder / f"{process:05d}-{time.time_ns():x}-{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        for file in self.files or ():
            file.close()

    def add(self, entries: np.ndarray, rows: np.ndarray) -> None:
        """Append rows [N, 2, C, h, w] and, once they are on the disk, their entries (ENTRY) [N].

        Raises OSError, with the file in its message, where writing fails, and from then on: a row behind half a row
        would lie at another's place. What was added before is kept.
        """
        if self.failure:
            raise self.failure
        if not len(entries):
            return
        # Unbuffered: a failed write must not be tried again when the file is closed.
        self.files = self.files or [self.path.with_suffix(end).open("xb", buffering=0) for end in (".rows", ".index")]
        for file, data in zip(self.files, (rows, entries), strict=True):
            try:
                _write(file, data.tobytes())
            except OSError as error:
                self.failure = OSError(error.errno, f"cannot write moments: {error.strerror}", file.name)
                raise self.failure from error


def _write(file, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())

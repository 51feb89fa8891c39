"""Entries of a store's index files: which picture a row is of, and what its file was like."""

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

ENTRY = np.dtype(
    [
        ("key", "S16"),  # hash of the picture's path below the store's root
        ("size", "<u8"),  # of the picture's file when it was extracted, bytes
        ("mtime", "<i8"),  # ... its modification time, ns
        ("digest", "<u8"),  # ... hash of its content
        ("written", "<i8"),  # when the entry was made, ns: of several for one picture the newest counts
        ("crc", "<u4"),  # CRC-32 of the row
    ]
)
"""An entry of an index file."""
PLACED = np.dtype([*ENTRY.descr, ("part", "<u4"), ("row", "<u8")])
"""An entry with its place: which part of the store, which row of it."""


def newest(entries: Sequence[np.ndarray]) -> np.ndarray:
    """All entries in one array, sorted by key, the newest of each key."""
    joined = np.concatenate([np.empty(0, PLACED), *entries])
    joined = joined[np.lexsort((joined["written"], joined["key"]))]
    return joined[np.append(joined["key"][1:] != joined["key"][:-1], True)] if len(joined) else joined


@dataclass(frozen=True)
class FileFacts:
    """What identifies the content of a picture's file."""

    size: int
    mtime: int
    digest: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Reads the whole file; raises OSError."""
        status = path.stat()
        content = _digest(path) if stat.S_ISREG(status.st_mode) else 0  # a pipe would block for ever
        return cls(status.st_size, status.st_mtime_ns, content)


def is_unchanged(path: Path, entry: np.void) -> bool:
    try:
        status = path.stat()
        if status.st_size != entry["size"]:
            return False
        return status.st_mtime_ns == entry["mtime"] or _digest(path) == entry["digest"]
    except OSError:
        return False  # gone or unreadable: whoever extracts it meets the error itself


def _digest(path: Path) -> int:
    with path.open("rb") as file:
        return int.from_bytes(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest(), "little")

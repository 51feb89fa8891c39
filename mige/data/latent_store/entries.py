"""Entries of a store's index files: which image a row is of, and what its file was like."""

import hashlib
import stat
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

ENTRY = np.dtype(
    [
        ("key", "S16"),  # hash of the image's path below the store's root, and of its crop
        ("size", "<u8"),  # of the image's file when it was extracted, bytes
        ("mtime", "<i8"),  # ... its modification time, ns
        ("digest", "<u8"),  # ... hash of its content
        ("width", "<u4"),  # of the upright image, px
        ("height", "<u4"),
        ("written", "<i8"),  # when the entry was made, ns: of several for one image the newest counts
        ("crc", "<u4"),  # CRC-32 of the fields above and the row
    ]
)
"""An entry of an index file, 60 bytes."""
PLACED = np.dtype([*ENTRY.descr, ("part", "<u4"), ("row", "<u8")])
"""An entry with its place: which part of the store, which row of it."""


@dataclass(frozen=True)
class FileFacts:
    """What identifies the content of an image's file."""

    size: int
    mtime: int
    digest: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Reads the whole file; raises OSError."""
        status = path.stat()
        content = _digest(path) if stat.S_ISREG(status.st_mode) else 0  # a pipe would block forever
        return cls(status.st_size, status.st_mtime_ns, content)


def make_entry(key: bytes, file: FileFacts, size: tuple[int, int], row: np.ndarray) -> np.ndarray:
    """The entry of a row [2, C, h, w], an ENTRY array [1]. size: the image's width and height, px."""
    entry = np.zeros(1, ENTRY)
    entry[0] = (key, file.size, file.mtime, file.digest, *size, time.time_ns(), 0)
    entry["crc"] = checksum(entry[0], row)
    return entry


def checksum(entry: np.void, row: np.ndarray) -> int:
    """CRC-32 of an entry (ENTRY or PLACED) up to its field crc, then of its row."""
    fields = entry.tobytes()[: ENTRY.fields["crc"][1]]
    return zlib.crc32(np.ascontiguousarray(row), zlib.crc32(fields))


def newest(entries: Sequence[np.ndarray]) -> np.ndarray:
    """All PLACED entries in one array, sorted by key, the newest of each key."""
    joined = np.concatenate([np.empty(0, PLACED), *entries])
    joined = joined[np.lexsort((joined["written"], joined["key"]))]
    return joined[np.append(joined["key"][1:] != joined["key"][:-1], True)] if len(joined) else joined


def is_unchanged(path: Path, entry: np.void) -> bool:
    """Whether the file is there and holds what it held when it was extracted; read only if its time differs."""
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

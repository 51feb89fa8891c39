"""Files and folders that are written whole or not at all; JSON lines; one writer a folder."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class FolderInUseError(OSError):
    """Another process writes into the folder; the message names it and says what to do."""


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old one or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into beside `path`, renamed to it at the end; on any error it is removed and `path` stays.

    Raises FileExistsError if `path` is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another folder or remove it")
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # gone already if the rename came through


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Be the only writer of an existing folder; the lock ends with the process, however it ends.

    Raises FolderInUseError at once where another process holds it.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        problem = "another run writes here; wait for it to end, or name another folder"
        raise FolderInUseError(f"{folder}: {problem}") from error
    try:
        yield
    finally:
        lock.release()


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a JSON-lines file, on the disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())

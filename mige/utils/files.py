"""Files and folders that are written whole or not at all; JSON lines; one writer a folder."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


class FolderInUseError(OSError):
    """Another process writes into the folder; the message names it and says what to do."""


def absolute(path: Path | str) -> str:
    """The path from `/`, without `.` and `..`; touches no file."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and ask the disk


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a reader sees the old one or the new one, never half of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace a file at once: a reader sees the old one or the new one, never half of it.

    Raises OSError that names the file where writing fails (a full disk); the old one stays then.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tmp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only now
        tmp.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk: without it, a rename may be lost where the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write into beside `path`, renamed to it at the end; on any error it is removed and `path` stays.

    Raises FileExistsError if `path` is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists; name another folder or remove it")
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    tmp.mkdir(parents=True)
    try:
        yield tmp
        tmp.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)  # gone already if the rename came through


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Be the only writer of an existing folder; the lock ends with the process, however it ends.

    The thread that holds it may take it again. Raises FolderInUseError at once where another process or thread does.
    """
    lock = FileLock(folder.resolve() / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        problem = "another run writes here; wait for it to end, or name another folder"
        raise FolderInUseError(f"{folder}: {problem}") from error
    try:
        yield
    finally:
        lock.release()


def read_json_lines(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], list[str]]:
    """The objects of a JSON-lines file with the numbers of their lines, and a sentence for every line that holds none.

    Lines count from 1. A last line without its end was cut by a kill and holds none. A file that is not there has no
    lines. Raises OSError where reading fails.
    """
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    rows, errors = [], []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append((number, parse_json_object(line)))
        except ValueError as error:
            errors.append(f"{path}, line {number}: {error}")
    if rest:
        errors.append(f"{path}, line {len(lines) + 1}: cut, {len(rest)} bytes without the end of a line")
    return rows, errors


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, with the path, for anything else; OSError where reading fails."""
    try:
        return parse_json_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json_object(text: bytes) -> dict[str, Any]:
    """The JSON object that UTF-8 text holds. Raises ValueError that says what is there instead."""
    if not text.strip():
        raise ValueError("blank, expected a JSON object")
    try:
        found = json.loads(text.decode("utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair can be read and not be written
    except RecursionError as error:
        raise ValueError("nested too deep, expected a JSON object") from error
    except UnicodeError as error:
        raise ValueError(f"no UTF-8 text ({error.reason}), expected a JSON object") from error
    except ValueError as error:
        raise ValueError(f"no JSON ({error}), expected an object") from error
    if not isinstance(found, dict):
        raise ValueError(f"JSON of type {type(found).__name__}, expected an object")
    return found


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a JSON-lines file, on the disk before this returns."""
    append_json_lines(path, [row])


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a JSON-lines file, on the disk before this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON-lines file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

"""The page's files: uploads, results and examples in one private folder, and who may name them.

A file is known by the path this store handed out for it, compared as a string: nothing a client sends is ever looked
up on the disk before it was found among those. Folders have names of `secrets.token_urlsafe`, so that a path is known
to whoever it was given to and to nobody else.
"""

import errno
import logging
import os
import secrets
import shutil
import stat
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

MAX_STORED_BYTES = 4 * 2**30
MAX_STORED_FILES = 50_000  # empty ones take room too
SUFFIXES = {
    ".avif": "image/avif",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
}
"""What a browser may show in place; everything else is a download. No SVG: it may hold scripts."""

_log = logging.getLogger(__name__)


class StoreFullError(Exception):
    """There is no room for another file until older ones are swept."""


@dataclass(frozen=True)
class Results:
    """The images of one request, each with its caption, the edited image as the model saw it, all in one archive."""

    images: tuple[tuple[str, str], ...]  # path, caption
    before: str | None = None
    archive: str | None = None  # of several images


class FileStore:
    """The files of one server. Safe to use from several threads.

    Args:
        folder: an empty folder of the server's own; made private to its user.
    """

    def __init__(self, folder: Path):
        folder.chmod(0o700)
        self.folder = folder.resolve(strict=True)
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}  # every path handed out -> bytes
        self._num_bytes = 0
        self._results: dict[str, Results] = {}  # token -> results
        self._below: dict[Path, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))  # entry -> paths, tokens
        self._permanent: set[Path] = set()

    def new_folder(self) -> Path:
        """A fresh folder with a name that cannot be guessed."""
        folder = self.folder / secrets.token_urlsafe(16)
        folder.mkdir(mode=0o700)
        return folder

    def add_upload(self, name: str, content: bytes) -> str:
        """Keep an upload; gives back the path by which its owner names it. Raises StoreFullError."""
        self.require_room(len(content))
        path = self.new_folder() / _safe_name(name)
        try:
            path.write_bytes(content)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(path.parent)
            raise StoreFullError from error
        return self.hand_out(path)

    def require_room(self, num_bytes: int = 1) -> None:
        """Raise StoreFullError where there is no room for a file of so many bytes."""
        with self._lock:
            if self._num_bytes + num_bytes > MAX_STORED_BYTES or len(self._sizes) >= MAX_STORED_FILES:
                raise StoreFullError

    def hand_out(self, path: Path) -> str:
        """Let clients name and fetch a new file of this folder."""
        size = path.stat().st_size
        with self._lock:
            self._sizes[str(path)] = size
            self._num_bytes += size
            self._below[self._entry(path)][0].append(str(path))
        return str(path)

    def add_example(self, image: Path) -> str:
        """Keep a copy of an image for as long as the server runs; gives back its path, for every visitor."""
        folder = self.new_folder()
        self._permanent.add(folder)
        return self.hand_out(Path(shutil.copyfile(image, folder / image.name)))

    def add_results(self, results: Results) -> str:
        """Keep results; gives back the token by which the page names them."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._results[token] = results
            self._below[self._entry(Path(results.images[0][0]))][1].append(token)
        return token

    def results(self, token: Any) -> Results | None:
        """The results of a token; None for anything that is none, or no longer one."""
        with self._lock:
            return self._results.get(token) if isinstance(token, str) else None

    def find(self, path: Any) -> Path | None:
        """The file of a path that was handed out, is still there and lies in this folder; None for anything else."""
        with self._lock:
            if not isinstance(path, str) or path not in self._sizes:
                return None
        found = Path(path)
        real = found.resolve()
        return found if found == real and found.is_file() and real.is_relative_to(self.folder) else None

    def open(self, path: Any) -> BinaryIO | None:
        """The file of a path that `find` finds, open for reading: what is swept or exchanged meanwhile changes nothing.

        None where `find` gives None, and where the file became a link or went away in between.
        """
        found = self.find(path)
        if found is None:
            return None
        try:
            file = os.fdopen(os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except OSError:  # swept, or a link by now
            return None
        if self.find(path) is None or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            return None
        return file

    def discard(self, path: str) -> None:
        """Delete an upload whose owner has no more use for it."""
        self._delete(self._entry(Path(path)))

    def sweep(self, keep_seconds: float) -> None:
        """Delete every folder and file older than that, the examples apart, and forget what lay in them."""
        oldest = time.time() - keep_seconds
        for entry in self.folder.iterdir():
            try:
                if entry not in self._permanent and entry.lstat().st_mtime <= oldest:
                    self._delete(entry)
            except OSError:  # tried again next time; the others go now
                _log.exception("%s could not be deleted", entry)

    def _delete(self, entry: Path) -> None:
        with self._lock:
            self._forget(entry)
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)

    def _entry(self, path: Path) -> Path:
        """What lies in this folder and holds a path: the unit that is swept."""
        return self.folder / path.relative_to(self.folder).parts[0]

    def _forget(self, entry: Path) -> None:
        paths, tokens = self._below.pop(entry, ((), ()))
        for path in paths:
            self._num_bytes -= self._sizes.pop(path)
        for token in tokens:
            del self._results[token]


def _safe_name(name: str) -> str:
    """A file name that is one on every system and keeps its suffix."""
    base = PurePath(name.replace("\\", "/")).name
    stem, dot, suffix = base.rpartition(".")
    if not dot:
        stem, suffix = base, ""
    clean = "".join(letter for letter in stem if letter.isalnum() or letter in " -_")[:60].strip() or "image"
    kept = "".join(letter for letter in suffix.lower() if letter.isascii() and letter.isalnum())[:8]
    return f"{clean}.{kept}" if kept else clean

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
import stat
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mige.models.vae import Moments, downscale
from mige.utils.errors import UserError

VERSION = 1
FIT = "center_crop"  # training crops every picture so: targets, sources and references
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}

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
_PLACED = np.dtype([*ENTRY.descr, ("part", "<u4"), ("row", "<u8")])


class StoreError(UserError, ValueError):
    """A store that cannot be used; the message names it, what was got and expected, and what to do."""


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
    expected = _make_meta(vae, size)
    if (folder / "meta.json").is_file():
        meta = _read_meta(folder)
        _require_equal(folder, meta, replace(expected, dtype=meta.dtype))
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
    meta = replace(_make_meta(vae, size), dtype=dtype, root=absolute(root))
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{secrets.token_hex(8)}.part"
    try:
        beside.write_text(json.dumps(asdict(meta), indent=2) + "\n", encoding="utf-8")
        os.link(beside, folder / "meta.json")  # whole or not at all, and only one of several processes succeeds
    except FileExistsError:
        pass  # compared below
    finally:
        beside.unlink(missing_ok=True)
    found = _read_meta(folder)
    _require_equal(folder, found, meta)
    return FeatureStore(folder, found)


def fingerprint(vae: AutoencoderKL) -> str:
    """sha256 of what makes moments: the encoder's weights as float32, and the config fields that shape it.

    The decoder has no part in it: VAEs that differ in the decoder alone give the same moments.
    """
    sha = hashlib.sha256()
    fields = ("act_fn", "block_out_channels", "down_block_types", "layers_per_block", "mid_block_add_attention")
    fields += ("norm_num_groups", "in_channels", "latent_channels", "use_quant_conv")
    sha.update(json.dumps({name: vae.config[name] for name in fields}).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            sha.update(f"{name} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()


def absolute(path: Path | str) -> str:
    """The path from `/`, without `.` and `..`; touches no file."""
    return os.path.abspath(path)  # noqa: PTH100 - resolve() would follow links and ask the disk


# ---- what a store was made with --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    version: int
    height: int  # pixels
    width: int
    fit: str
    vae: str  # fingerprint
    shape: tuple[int, int, int]  # of a mean: [C, h, w]
    dtype: str  # of the stored values
    root: str  # absolute; keys are paths relative to it

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Shape of a row: mean and std."""
        return (2, *self.shape)

    @property
    def row_bytes(self) -> int:
        """Size of a row as stored."""
        return int(np.prod(self.row)) * DTYPES[self.dtype].itemsize


def _make_meta(vae: AutoencoderKL, size: int | tuple[int, int]) -> Meta:
    height, width = (size, size) if isinstance(size, int) else size
    cell = downscale(vae)
    if min(height, width) < cell or height % cell or width % cell:
        raise StoreError(f"pictures of {height} x {width} pixels, expected multiples of {cell}; give another size")
    shape = (vae.config.latent_channels, height // cell, width // cell)
    return Meta(VERSION, height, width, FIT, fingerprint(vae), shape, "float32", "")


def _read_meta(folder: Path) -> Meta:
    path = folder / "meta.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["version"] != VERSION:
            raise StoreError(f"{path}: version {values['version']}, expected {VERSION}; extract again")
        meta = Meta(**values | {"shape": tuple(values["shape"])})
        if meta.dtype not in DTYPES or meta.row_bytes <= 0:
            raise ValueError(f"dtype {meta.dtype!r}, shape {meta.shape}")
    except (TypeError, KeyError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: damaged ({error!r}); restore it or extract again into another folder") from error
    return meta


def _require_equal(folder: Path, found: Meta, expected: Meta) -> None:
    """Raise StoreError naming every difference; the root may differ."""
    theirs, ours = asdict(replace(found, root="")), asdict(replace(expected, root=""))
    differing = [f"{name} {theirs[name]} there, {ours[name]} expected" for name in ours if theirs[name] != ours[name]]
    if differing:
        raise StoreError(
            f"{folder}: made with other settings: {'; '.join(differing)}; "
            "use the size and the VAE of the store, or extract again into another folder"
        )


# ---- reading ---------------------------------------------------------------------------------------------------------


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
        self._entries = _newest([self._whole_entries(number) for number in range(len(self._parts))])
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
        return [path for path, entry in there if not _is_unchanged(path, entry)]

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
        placed = np.empty(count, _PLACED)
        for name in ENTRY.names:
            placed[name] = entries[name]
        placed["part"], placed["row"] = number, np.arange(count)
        return placed


def _newest(entries: Sequence[np.ndarray]) -> np.ndarray:
    """All entries in one array, sorted by key, the newest of each key."""
    joined = np.concatenate([np.empty(0, _PLACED), *entries])
    joined = joined[np.lexsort((joined["written"], joined["key"]))]
    return joined[np.append(joined["key"][1:] != joined["key"][:-1], True)] if len(joined) else joined


# ---- writing -------------------------------------------------------------------------------------------------------


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


def _is_unchanged(path: Path, entry: np.void) -> bool:
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


# ---- the official layout ---------------------------------------------------------------------------------------------


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

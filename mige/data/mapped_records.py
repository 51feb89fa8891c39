"""Records on the disk, mapped into memory: a set of any size costs a process next to nothing.

An Arrow file of one column of text, a record a row, which `datasets` maps. Every process and worker opens it by itself
and they share its pages.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

from mige.data.records import Record
from mige.tasks import Task
from mige.utils.files import write_text

COLUMN = "record"
_SCANNED = 512  # records read at a time where all are
_ROWS = 50_000  # a batch of the file: each costs memory when it is opened
_READS = 8  # until the pages that were read are let go: they count as the own of a process, up to 4 MB a record


class RecordWriter:
    """Writes an Arrow file of records. A context manager; `len(...)`: written so far."""

    def __init__(self, file: Path):
        features = datasets.Features({COLUMN: datasets.Value("string")})
        self._writer = datasets.arrow_writer.ArrowWriter(path=str(file), features=features, writer_batch_size=_ROWS)
        self._waiting: list[str] = []
        self._written = 0

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
            self._writer.finalize()
        else:
            self._writer.close()

    def __len__(self) -> int:
        return self._written + len(self._waiting)

    def add(self, rows: Iterable[str]) -> None:
        """Records as `to_row` spells them."""
        self._waiting += rows
        if len(self._waiting) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_batch({COLUMN: self._waiting}, writer_batch_size=len(self._waiting))
        self._written += len(self._waiting)
        self._waiting = []


class MappedRecords(Sequence[Record]):
    """The records of an Arrow file, but for some: each is made when it is asked for.

    Args:
        file: written by `RecordWriter`.
        left_out: places in the file of those that are not shown, ascending.
        fit: every record has what training needs.
    """

    def __init__(self, file: Path, left_out: np.ndarray | Sequence[int] = (), *, fit: bool = False):
        self.file, self.fit = file, fit
        self.left_out = np.asarray(left_out, dtype=np.int64)
        self._before = self.left_out - np.arange(len(self.left_out))  # records shown before each that is left out
        self._count = len(self._table) - len(self.left_out)
        self._reads = 0
        self._remembered: dict[str, str] = {}
        status = file.stat()
        self._identity = f"{status.st_ino} {status.st_mtime_ns}"  # another process may put a newer file in its place

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        self._reads += 1
        if self._reads % _READS == 0:
            self._let_go()
        return from_row(self._table[int(self._places(index))][COLUMN])

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self), _SCANNED):
            places = self._places(np.arange(first, min(first + _SCANNED, len(self))))
            rows = self._table[int(places[0]) : int(places[-1]) + 1][COLUMN]
            for place in places:
                yield from_row(rows[place - places[0]])
            self._let_go()

    def without(self, places: Iterable[int], *, fit: bool = False) -> "MappedRecords":
        """All but those at some places of this sequence."""
        more = self._places(np.fromiter(places, np.int64))
        return MappedRecords(self.file, np.union1d(self.left_out, more), fit=fit or self.fit)

    def remembered(self, name: str, compute: Callable[["MappedRecords"], str]) -> str:
        """What `compute` makes of these records, kept beside their file: all are read once and not at every start.

        name: of the work, with all that decides its result besides the records.
        """
        what = f"{name} {self._identity} ".encode() + self.left_out.tobytes()
        kept = self.file.with_name(f"{hashlib.sha256(what).hexdigest()[:32]}.txt")
        if kept.name not in self._remembered:
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)  # a run may outlive its cache
                write_text(kept, compute(self))
            self._remembered[kept.name] = kept.read_text(encoding="utf-8")
        return self._remembered[kept.name]

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, for a process that opens it by itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_mapping", "_table")}

    @cached_property
    def _mapping(self) -> mmap.mmap:
        with self.file.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _table(self) -> datasets.Dataset:
        # Not Dataset.from_file, whose mapping cannot be reached, so that its pages would stay. Without a fingerprint
        # the whole table would be hashed for one.
        table = pyarrow.ipc.open_stream(pyarrow.py_buffer(self._mapping)).read_all()
        self._let_go()  # of the head of every batch
        return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=str(self.file))

    def _let_go(self) -> None:
        """The pages stay in the system's cache, and are mapped again where they are read again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def _places(self, indices: int | np.ndarray) -> np.ndarray:
        """Of records in this sequence, their places in the file."""
        return indices + np.searchsorted(self._before, indices, side="right")


def to_row(record: Record) -> str:
    """A record as text; its source by its place among the references."""
    references, source = record.references, record.source
    paths = [None if path is None else str(path) for path in (record.target, record.mask)]
    source = references.index(source) if source in references else source and str(source)
    fields = (record.id, record.task, record.prompt, [str(path) for path in references], source, *paths)
    return json.dumps([*fields, record.edit_type, record.where, record.extra], separators=(",", ":"))


def from_row(row: str) -> Record:
    """The record that `to_row` made the text of."""
    name, task, prompt, references, source, target, mask, edit_type, where, extra = json.loads(row)
    references = tuple(map(Path, references))
    target, mask = (None if path is None else Path(path) for path in (target, mask))
    source = references[source] if isinstance(source, int) else source and Path(source)
    return Record(name, Task(task), prompt, references, source, target, edit_type, where, extra, mask)

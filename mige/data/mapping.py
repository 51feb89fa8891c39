"""Files of records -> mapped records, once: what is read and checked is kept until the file or the code changes.

A file's folder in the cache holds `records.arrow` (mapped_records), `issues.jsonl`, and `source.json`, which says what
file it was made from. It is made by whichever process comes first, while the others wait; whole or not at all. The
cache is that of `datasets`: $HF_DATASETS_CACHE, else below $HF_HOME.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pyarrow
from filelock import FileLock

import mige
from mige.data.checks import MANY, check_training_text, shared_target
from mige.data.json_rows import line_blocks, parse_lines, read_rows
from mige.data.latent_store.entries import FileFacts, is_unchanged
from mige.data.mapped_records import MappedRecords, RecordWriter, to_row
from mige.data.parsing import gather, make_record
from mige.data.records import BadRecordsError, Issue, Report
from mige.tasks import Task
from mige.utils.files import absolute, atomic_directory, read_json_object

log = logging.getLogger("mige")

_SOURCE = "source.json"
_FILES = _RECORDS, _ISSUES, _PLACES = "records.arrow", "issues.jsonl", "places.npz"
_BLOCK = 2_000  # rows that are converted at a time
_LARGE = 2**26  # bytes of a file that several processes convert
_CODE = ("data/json_rows.py", "data/parsing.py", "data/records.py", "data/checks.py", "data/mapping.py",
         "data/mapped_records.py", "models/instruction.py", "tasks.py", "utils/files.py")  # fmt: skip


@dataclass(frozen=True)
class MappedSet:
    """All records of a file that can be read, and what is wrong in it.

    Attributes:
        records: the good ones and those that cannot be trained on.
        unfit: places of the latter, ascending: no target, or a text that does not pair with its references.
        issues: of the file, of its rows, of what its records share and of their texts; not of images.
    """

    records: MappedRecords
    unfit: np.ndarray
    issues: list[Issue]


def map_records(file: Path, *, root: Path | None = None, task: Task | None = None) -> MappedSet:
    """The records of a .json or .jsonl file for training, converted if that was not done before.

    root, task: as for `read_records`. Raises BadRecordsError for a file that cannot be read at all, OSError where the
    cache cannot be written.
    """
    try:
        facts = FileFacts.of(file)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path, or one the locale cannot spell
        raise BadRecordsError(Report(issues=read_rows(file)[1]).text()) from error
    known = (str(file), absolute(file), str(root), str(Path.cwd()), str(task), *_code())
    folder = cache_folder() / hashlib.sha256(json.dumps(known).encode()).hexdigest()[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (found := _open(folder, file)) is None:
            log.info("%s: its records are converted, once, to %s", file, folder)
            shutil.rmtree(folder, ignore_errors=True)
            with atomic_directory(folder) as made:
                _build(made, file, file.parent if root is None else root, task)
                sizes = {name: (made / name).stat().st_size for name in _FILES}
                (made / _SOURCE).write_text(json.dumps(asdict(facts) | {"sizes": sizes}))
            found = _open(folder, file)
    if found is None:
        raise OSError(f"{file}: it changes while it is read; start again when it is whole")
    return found


def cache_folder() -> Path:
    """Where converted files are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "mige-records"


def _code() -> list[str]:
    """Digests of the code that decides what records and issues come out."""
    return [hashlib.sha256((Path(mige.__file__).parent / name).read_bytes()).hexdigest() for name in _CODE]


def _open(folder: Path, file: Path) -> MappedSet | None:
    """What a folder of the cache holds; None if it is not whole, or not of what the file holds now."""
    try:
        source = read_json_object(folder / _SOURCE)
        whole = {name: (folder / name).stat().st_size for name in _FILES} == source["sizes"]
        if not whole or not is_unchanged(file, source):
            return None
        with np.load(folder / _PLACES) as places:
            records = MappedRecords(folder / _RECORDS, places["taken"])
            unfit = places["unfit"]
        with (folder / _ISSUES).open(encoding="utf-8") as lines:
            return MappedSet(records, unfit, [Issue(**json.loads(line)) for line in lines])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        log.warning("%s: damaged (%s), made again", folder, error)
        return None


@dataclass(frozen=True)
class _Block:
    """Some converted rows. ids, targets: 8 bytes a record that stand for its id and its target's path; 0: no target."""

    rows: list[str] = field(default_factory=list)
    unfit: list[int] = field(default_factory=list)  # places in `rows`
    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)  # of the rows
    text_issues: list[Issue] = field(default_factory=list)  # of what training needs


def _convert(block: Sequence[tuple], *, are_lines: bool, file: Path, root: Path, task: Task | None) -> _Block:
    """Lines of a file (see `parse_lines`), or its rows with their numbers, as records."""
    done = _Block()
    if are_lines:
        block, issues = parse_lines(str(file), block)
        done.issues.extend(issues)
    for number, row in block:
        where, name = f"{file}, record {number}", f"{number:05d}"
        record, issues = make_record(row, where=where, root=root, default_id=name, task=task)
        done.issues.extend(issues)
        if record is None:
            continue
        issues = check_training_text(record)
        if record.target is None:
            issues.append(Issue(record.where, 'no target, the field "image"', "training needs one"))
        if any(issue.fatal for issue in issues):
            done.unfit.append(len(done.rows))
        done.text_issues.extend(issues)
        done.rows.append(to_row(record))
        done.ids.append(_digest(record.id.casefold()))
        done.targets.append(0 if record.target is None else _digest(absolute(record.target)))
    return done


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little") | 1


def _build(folder: Path, file: Path, root: Path, task: Task | None) -> None:
    """Fill a folder of the cache."""
    try:
        issues = _write(folder, file, root, task, line_blocks(file, _BLOCK))
    except UnicodeDecodeError:
        issues = _write(folder, file, root, task, None)
    with (folder / _ISSUES).open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(asdict(issue)) + "\n" for issue in issues)  # ASCII: a path may be no UTF-8


def _write(
    folder: Path, file: Path, root: Path, task: Task | None, lines: Iterator[Sequence[tuple]] | None
) -> list[Issue]:
    """Write records and places; what is wrong. lines: of the file; None: it is read as a whole."""
    issues, blocks = [], lines
    if blocks is None:
        rows, issues = read_rows(file)
        blocks = (rows[first : first + _BLOCK] for first in range(0, len(rows), _BLOCK))
    text_issues, unfit, ids, targets = [], [], [], []
    convert = partial(_convert, are_lines=lines is not None, file=file, root=root, task=task)
    with RecordWriter(folder / _RECORDS) as writer, _mapped(convert, file) as mapped:
        for done in mapped(blocks):
            unfit += [len(writer) + place for place in done.unfit]
            ids.append(np.array(done.ids, np.uint64))
            targets.append(np.array(done.targets, np.uint64))
            issues += done.issues
            text_issues += done.text_issues
            writer.add(done.rows)
    records = MappedRecords(folder / _RECORDS)
    taken, found = _taken_ids(file, records, np.concatenate([np.empty(0, np.uint64), *ids]))
    targets = np.concatenate([np.empty(0, np.uint64), *targets])
    targets[taken] = 0
    _, first, times = np.unique(targets[targets > 0], return_index=True, return_counts=True)
    first = np.flatnonzero(targets > 0)[first]
    many = sorted(zip(first[times >= MANY], times[times >= MANY], strict=True))
    repeats = [shared_target(absolute(records[int(place)].target), int(shown)) for place, shown in many]
    unfit = np.setdiff1d(np.array(unfit, np.int64), taken)
    np.savez(folder / _PLACES, taken=taken, unfit=unfit - np.searchsorted(taken, unfit))
    gone = {records[int(place)].where for place in taken}
    return issues + found + repeats + [issue for issue in text_issues if issue.where not in gone]


def _taken_ids(file: Path, records: MappedRecords, ids: np.ndarray) -> tuple[np.ndarray, list[Issue]]:
    """Places of records whose id an earlier one has, and an issue each."""
    _, which, times = np.unique(ids, return_inverse=True, return_counts=True)
    places = np.flatnonzero(times[which] > 1)
    report, alike = Report(), [records[int(place)] for place in places]
    gather([(file, alike)], report)
    kept = {record.where for record in report.records}
    taken = [place for place, record in zip(places, alike, strict=True) if record.where not in kept]
    return np.array(taken, np.int64), report.issues


@contextmanager
def _mapped(convert: Callable[[Sequence[tuple]], _Block], file: Path) -> Iterator[Callable]:
    """`map` in order, by several processes if the file is large; no more blocks are read than they are at."""
    if file.stat().st_size < _LARGE:
        yield partial(map, convert)
        return
    workers = min(16, os.cpu_count() or 1)
    context = get_context("forkserver")
    context.set_forkserver_preload(["mige.data.mapping"])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:

        def mapped(blocks: Iterable[Sequence[tuple]]) -> Iterator[_Block]:
            running: deque[Future[_Block]] = deque()
            for block in blocks:
                running.append(pool.submit(convert, block))
                if len(running) > 2 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

        yield mapped

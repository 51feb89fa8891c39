"""Check a whole training set: records, their targets and every image; list every bad record with its reason.

    python tools/check_data.py data/magicbrush/records.jsonl data/subjects200k/records.jsonl
    python tools/check_data.py train.json --root images --no-images

The exit code is 1 if there is any error. Reports are in the order of the files, whatever the number of workers.
"""

import argparse
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from mige.cli import command
from mige.data.checks import check_images, check_repeats, check_training_text
from mige.data.parsing import read_records
from mige.data.records import Issue, Record
from mige.tasks import Task
from mige.utils.errors import UserError
from mige.utils.progress import Progress

CHUNK = 64  # records a process decodes at a time; an image shared within a chunk is decoded once


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help=".json and .jsonl files")
    parser.add_argument("--root", type=Path, help="what relative paths start from (default: the folder of each file)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--images", action=argparse.BooleanOptionalAction, default=True, help="decode every image")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}, expected at least 1")
    return args


def check_targets(records: Sequence[Record]) -> list[Issue]:
    """An issue for every record without a target image, which training needs."""
    hint = 'give "image"; a row in the layout of Emu Edit has none and is no training data'
    return [Issue(record.where, "no target image", hint) for record in records if record.target is None]


def _leave_ctrl_c_to_the_parent() -> None:
    """A terminal sends it to every process of the group: each worker would print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_all_images(records: Sequence[Record], workers: int) -> Iterator[Issue]:
    """Issues in the order of the records; a process holds the images of no more than one record at a time."""
    chunks = [records[first : first + CHUNK] for first in range(0, len(records), CHUNK)]
    context = get_context("forkserver")
    context.set_forkserver_preload(["mige.data.checks"])
    with (
        Progress(total=len(records), unit="record", desc="images") as bar,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_ctrl_c_to_the_parent) as pool,
    ):
        try:
            for chunk, issues in zip(
                chunks, pool.map(partial(check_images, workers=1, training=True), chunks), strict=True
            ):
                bar.update(len(chunk), failed=len({issue.where for issue in issues if issue.fatal}))
                yield from issues
        except BrokenProcessPool as error:
            raise UserError("a worker process died, most likely of short memory; give fewer --workers") from error
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # or the chunks that wait would all be decoded first
            raise


def file_of(where: str) -> str:
    """The file in a place such as "data.jsonl, line 3"."""
    return re.sub(r", (record|line) \d+.*$", "", where, flags=re.DOTALL)


def print_counts(files: Sequence[Path], good: Sequence[Record], bad: Sequence[str]) -> None:
    """A line a file: its good records by task, its bad ones."""
    tasks = Counter((file_of(record.where), record.task) for record in good)
    faulty = Counter(map(file_of, bad))
    lines = [(str(file), [tasks[str(file), task] for task in Task] + [faulty[str(file)]]) for file in files]
    lines.append(("total", [sum(column) for column in zip(*(counts for _, counts in lines), strict=True)]))
    for names, counts in [("file", [*Task, "bad"]), *lines]:
        print("".join(f"{count!s:>13}" for count in counts), names, sep="  ")


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    files = list(dict.fromkeys(args.files))
    report = read_records(files, root=args.root)
    issues = report.issues + check_targets(report.records) + check_repeats(report.records)
    issues += [issue for record in report.records for issue in check_training_text(record)]
    if args.images and report.records:
        issues += check_all_images(report.records, args.workers)
    errors = [issue for issue in issues if issue.fatal]
    bad = dict.fromkeys(error.where for error in errors)
    good = [record for record in report.records if record.where not in bad]
    print_counts(files, good, list(bad))
    for issue in [*errors, *(issue for issue in issues if not issue.fatal)]:
        print(issue)
    print(f"{len(errors)} errors in {len(bad)} places, {len(good)} good records")
    return 1 if errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted="the check is not finished, the same command starts anew")

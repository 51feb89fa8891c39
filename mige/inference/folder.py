"""A run's folder: one writer at a time, settings that stay, and what of it is finished.

It holds config.json, images/<id>.png, results.jsonl (a line a finished record), failures.jsonl where records were bad,
and pages to look at. Several processes of one run keep a results-<process>.jsonl each until the end.
"""

import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import mige
from mige.data.records import Record, Report
from mige.inference.results import Finished, is_of, read_finished
from mige.inference.settings import Settings, differing
from mige.utils.errors import UserError
from mige.utils.files import FolderInUseError, folder_lock, json_lines, read_json_object, write_text

_NAMED = 20  # errors of a folder that are printed; the others are counted


class RunError(UserError, RuntimeError):
    """A run that cannot start or resume; the message says which records and what to do."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Make a run's folder where there is none, and be the only one who writes into it.

    Raises RunError where it cannot be made, or where another run holds it; nothing in it is touched then.
    """
    with ExitStack() as held:
        try:
            if folder.is_symlink() and not folder.exists():
                raise RunError(f"{folder} is a link to {folder.readlink()}, which is not there: use another --output")
            if folder.exists() and not folder.is_dir():
                raise RunError(f"{folder} is a file, expected a folder or nothing: use another --output")
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder_lock(folder))
        except FolderInUseError as error:
            raise RunError(str(error)) from error
        except OSError as error:
            raise RunError(f"{folder} cannot be written into ({error.strerror}): use another --output") from error
        yield


def check_folder(folder: Path, settings: Settings, records: Sequence[Record]) -> Finished:
    """What the folder has finished; writes nothing.

    Raises RunError if it holds a run with other settings, other records of the same ids, or cannot be read.
    """
    with _as_run_errors(folder):
        finished = read_finished(folder, [folder / "results.jsonl", *sorted(folder.glob("results-*.jsonl"))])
        finished.errors += _check_config(folder, settings, finished.lines)
    _check_records(folder, records, finished.lines)
    return finished


@contextmanager
def _as_run_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{error.filename or folder} cannot be read or written ({error.strerror})"
        raise RunError(f"{problem}: correct it, or use another --output") from error


def _check_config(folder: Path, settings: Settings, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Raise RunError for other settings than config.json has; an error where it is damaged and the lines agree."""
    path, errors, config = folder / "config.json", [], {}
    try:
        config = read_json_object(path)
        if not isinstance(config.get("settings"), dict):
            errors = [f'{path}: an object without the "settings" of a run']
            if not lines:
                raise RunError(
                    f"{errors[0]}: something else's file, or the folder holds a run with other settings: "
                    "use another --output, or delete the file"
                )
    except FileNotFoundError:
        pass
    except ValueError as error:
        errors = [str(error)]
    if isinstance(config.get("settings"), dict):
        phrases = differing(config["settings"], settings, config.get("resolved"))
    else:  # lost: the lines say what their images were made with
        own = (differing(line["settings"], settings) for line in lines.values() if "settings" in line)
        phrases = list(dict.fromkeys(phrase for some in own for phrase in some))
    if phrases:
        raise RunError(f"{folder} holds a run with other settings ({'; '.join(phrases)}): use another --output")
    return errors


def _check_records(folder: Path, records: Sequence[Record], lines: Mapping[str, Mapping[str, Any]]) -> None:
    ids = {name.casefold(): name for name in lines}
    for record in records:
        if (other := ids.setdefault(record.id.casefold(), record.id)) != record.id:
            raise RunError(
                f"{record.where}: the id {record.id!r} differs from {other!r} in nothing but case, and their images "
                "would be one file where names ignore it: use another id, or another --output"
            )
        if record.id in lines and not is_of(lines[record.id], record):
            advice = "--id" if record.where.startswith("command line") else "id"
            raise RunError(
                f"{record.where}: {folder} has a finished {record.id!r} with another prompt or other images: "
                f"use another --output or another {advice}"
            )


def open_folder(folder: Path, settings: Settings, records: Sequence[Record]) -> None:
    """Make a claimed folder ready for a run or for resuming one; says on stderr what counts as nothing in it.

    Raises RunError where `check_folder` does.
    """
    finished = check_folder(folder, settings, records)
    for error in finished.errors[:_NAMED]:
        print(f"warning: {error}; what it stood for is made again", file=sys.stderr)
    if len(finished.errors) > _NAMED:
        print(f"warning: {len(finished.errors) - _NAMED} more of this kind in {folder}", file=sys.stderr)
    with _as_run_errors(folder):
        (folder / "images").mkdir(exist_ok=True)
        for half_written in (folder / "images").glob(".*.part"):  # of a killed run
            half_written.unlink()
        write_config(folder, settings)
        _write_results(folder, finished)


def write_config(folder: Path, settings: Settings) -> None:
    """config.json: the settings, where their folders lie, and the versions that the run began with."""
    path = folder / "config.json"
    try:
        if isinstance(read_json_object(path).get("settings"), dict):
            return
    except (FileNotFoundError, ValueError):  # none yet, or one that `check_folder` has named
        pass
    versions = {"mige": mige.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    versions |= {"transformers": transformers.__version__, "python": platform.python_version()}
    config = {"settings": asdict(settings), "resolved": settings.resolved(), "versions": versions}
    write_text(path, json.dumps(config, indent=2) + "\n")


def merge_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Put what each process finished into results.jsonl; returns its lines by id."""
    finished = read_finished(folder, [folder / "results.jsonl", *sorted(folder.glob("results-*.jsonl"))])
    _write_results(folder, finished)
    return finished.lines


def _write_results(folder: Path, finished: Finished) -> None:
    """Write the lines that count; then the processes' own files can go."""
    text = json_lines(finished.lines.values())
    path = folder / "results.jsonl"
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
    for part in folder.glob("results-*.jsonl"):
        part.unlink()


def write_failures(report: Report, folder: Path) -> Path:
    """failures.jsonl: a line an error; without errors, one of an earlier run is removed. Returns its path."""
    path = folder / "failures.jsonl"
    if report.errors:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"where": f.where, "message": f.message, "hint": f.hint} for f in report.errors]
        write_text(path, json_lines(lines))
    else:
        path.unlink(missing_ok=True)
    return path

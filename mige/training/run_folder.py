"""The folder of a training run: config.json, metrics.jsonl, log.txt, checkpoints/, samples/; one training at a time."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from mige.config import Config, ConfigError
from mige.training.errors import TrainingError
from mige.training.metrics import truncate_log
from mige.utils.files import FolderInUseError, folder_lock, write_text

log = logging.getLogger("mige")

_FORMAT = logging.Formatter("%(asctime)s %(message)s")


def check_run_folder(run: Path) -> None:
    """Raise ConfigError if no training can write there, TrainingError if another one does; writes nothing."""
    there = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise ConfigError(f"--output {run}: {there} is not a folder; name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {run}: {there} cannot be written to; name another folder")
    if (run / ".lock").exists():
        with _only_training(run):
            pass


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that does not exist or is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"train.trackers: {name!r}, expected some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in [str(getattr(one, "value", one)) for one in get_available_trackers()]:
            raise ConfigError(f"train.trackers: {name!r} is not installed: pip install {name}, or leave it out")


def log_to_terminal() -> None:
    """The run's own messages go to the terminal, and wait for the file; accelerate's stay out of both."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    for handler in (logging.StreamHandler(), MemoryHandler(10**6, flushLevel=logging.CRITICAL + 1)):
        handler.setFormatter(_FORMAT)
        log.addHandler(handler)
    log.setLevel(logging.INFO)


@contextmanager
def open_run_folder(
    accelerator: Accelerator, config: Config, run: Path, step: int, load: Callable[[], None]
) -> Iterator[None]:
    """Be the only training of a folder: cut what lies beyond `step`, write config.json, log, start the trackers.

    load: opens the checkpoint of that step; where it fails, nothing has been written yet. Called by every process.
    """
    if not accelerator.is_main_process:
        load()
        accelerator.wait_for_everyone()
        accelerator.init_trackers("mige")
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {run}: cannot be made: {error.strerror}; name another folder") from error
    with _only_training(run):
        load()
        _log_to_file(run / "log.txt")
        write_text(run / "config.json", json.dumps(config.dump(), indent=2) + "\n")
        _cut(run, step)
        accelerator.wait_for_everyone()
        accelerator.init_trackers("mige", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


@contextmanager
def _only_training(run: Path) -> Iterator[None]:
    try:
        with folder_lock(run):
            yield
    except FolderInUseError as error:
        raise TrainingError(str(error)) from error


def _log_to_file(path: Path) -> None:
    file = logging.FileHandler(path)
    file.setFormatter(_FORMAT)
    for handler in [one for one in log.handlers if isinstance(one, MemoryHandler)]:
        handler.setTarget(file)
        handler.close()  # writes what has waited
        log.removeHandler(handler)
    log.addHandler(file)


def _cut(run: Path, step: int) -> None:
    """What belongs to later steps is of another timeline, or will be made again."""
    for name in ("metrics.jsonl", "held_out.jsonl"):
        truncate_log(run / name, step)
    for folder in (run / "samples").glob("step-*"):
        if re.fullmatch(r"step-\d{8}", folder.name) and int(folder.name[5:]) > step:
            shutil.rmtree(folder)

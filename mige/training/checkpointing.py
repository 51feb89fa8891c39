"""Checkpoints of a training run: `checkpoints/step-00001000/` with everything to resume from, and to infer with.

* `state/`  parameters, optimiser and random state, by accelerate, in the layout of its backend
* `model/`  a pipeline folder for inference (averaged parameters if there are any); with LoRA `lora/` in its place
* `progress.json`  steps done, and what must not change on resume (mige/training/resume.py)

A checkpoint is written under another name and renamed when whole, so a half-written one is never picked up. Those in
`checkpoints/` are one line: each was reached from the one before. Resuming from an older one moves the later ones into
`checkpoints/abandoned-N/`, where nothing reads or deletes them.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mige.training.errors import TrainingError
from mige.utils.files import sync_folder, write_text

_NAME = re.compile(r"step-(\d{8})")


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run's line, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def newest_checkpoint(run: Path) -> Path | None:
    """The last of the run's line; None where there is none."""
    return next(reversed(list_checkpoints(run)), None)


def checkpoint_to_resume(run: Path, named: Path | None) -> Path | None:
    """The one that is named, else the newest of the run's line; None for a run that begins.

    Raises TrainingError where none is named and all are abandoned: it had resumed from elsewhere and saved none since.
    """
    chosen = named or newest_checkpoint(run)
    if chosen is None and (others := sorted((run / "checkpoints").glob("abandoned-*/step-*"))):
        raise TrainingError(
            f"{run}: it had resumed from a checkpoint of another place and saved none of its own, so it would start "
            f"anew: name one by --resume, that one again or such as {others[-1]}, or remove the abandoned ones"
        )
    return chosen


def read_progress(checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Steps done, and what must not change. Raises TrainingError for a folder that is no whole checkpoint."""
    path = checkpoint / "progress.json"
    if not path.is_file():
        why = "no such folder" if not checkpoint.exists() else "no progress.json in it"
        raise TrainingError(f"{checkpoint}: {why}; expected a checkpoint such as RUN/checkpoints/step-00001000")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        step, invariants = saved["step"], saved["invariants"]
        if type(step) is not int or not isinstance(invariants, dict):
            raise ValueError("step is no whole number, or invariants no object")
    except KeyError as error:
        raise TrainingError(
            f"{path}: no {error}: saved by an earlier version, which drew other samples; start a new run from "
            f"train.pretrained={str(checkpoint / 'model')!r}"
        ) from error
    except (ValueError, TypeError) as error:
        raise TrainingError(f"{path}: cannot be read: {error}; resume from another checkpoint") from error
    return step, invariants


def save_checkpoint(
    accelerator: Accelerator,
    run: Path,
    step: int,
    invariants: Mapping[str, Any],
    export: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep` of its line. Called by every process.

    Args:
        invariants: facts that must be the same on resume, JSON.
        export: writes the inference part into a folder; called by every process, and only the main one writes.

    Raises TrainingError if writing fails (a full disk); earlier checkpoints are untouched.
    """
    target = run / "checkpoints" / f"step-{step:08d}"
    part = target.with_name(f".{target.name}.part")
    try:
        if accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part / "state"))
        export(part)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            progress = {"step": step, "invariants": dict(invariants)}
            write_text(part / "progress.json", json.dumps(progress, indent=2) + "\n")
            part.rename(target)
            sync_folder(target.parent)
            for old in list_checkpoints(run)[:-keep]:
                shutil.rmtree(old)
    except Exception as error:  # torch and safetensors report a full disk in several types
        good = list_checkpoints(run)
        shutil.rmtree(part, ignore_errors=True)
        last = good[-1] if good else "none"
        raise TrainingError(
            f"cannot save the checkpoint of step {step}: {error}; last good checkpoint: {last}"
        ) from error
    accelerator.wait_for_everyone()
    return target


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """Load a checkpoint's state into what accelerate prepared. Raises TrainingError if it cannot be read."""
    try:
        accelerator.load_state(str(checkpoint / "state"))
    except Exception as error:  # a file that is cut off or missing is reported in several types
        raise TrainingError(
            f"{checkpoint / 'state'} cannot be loaded: {type(error).__name__}: {error}; resume from another checkpoint"
        ) from error


def abandon_others(run: Path, checkpoint: Path) -> list[Path]:
    """Move away the checkpoints of `run` that `checkpoint` was not reached through; returns where they are now."""
    line = list_checkpoints(run)
    there = [path.resolve() for path in line]
    own = there.index(checkpoint.resolve()) + 1 if checkpoint.resolve() in there else 0
    if not line[own:]:
        return []
    numbers = [int(path.name.removeprefix("abandoned-")) for path in (run / "checkpoints").glob("abandoned-*")]
    folder = run / "checkpoints" / f"abandoned-{max(numbers, default=0) + 1}"
    folder.mkdir()
    # The newest first: killed in between, what is left is still one line.
    return [path.rename(folder / path.name) for path in reversed(line[own:])]

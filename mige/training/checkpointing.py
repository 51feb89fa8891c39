"""Checkpoints of a training run: `checkpoints/step-00001000/` with everything to go on from, and to infer with.

* `state/`  weights, optimiser and random state, by accelerate, in the layout of its backend
* `model/`  a pipeline folder for inference (averaged weights if there are any); with LoRA `lora/` in its place
* `progress.json`  steps done, and what must not change on resume

A checkpoint is written under another name and renamed when whole, so a half-written one is never picked up.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

_NAME = re.compile(r"step-(\d{8})")


class TrainingError(RuntimeError):
    """Training that cannot start or go on; the message says why, what is safe and what to do."""


def finished(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def save(
    accelerator: Accelerator,
    run: Path,
    step: int,
    fixed: Mapping[str, Any],
    export: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and drop all but the newest `keep`. Called by every process.

    Args:
        fixed: facts that must be the same on resume, JSON.
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
            (part / "progress.json").write_text(json.dumps({"step": step, **fixed}, indent=2) + "\n")
            if target.exists():  # saved before by a run that then went back to an older checkpoint
                shutil.rmtree(target)
            part.rename(target)
            for old in finished(run)[:-keep]:
                shutil.rmtree(old)
    except Exception as error:  # torch and safetensors report a full disk in several types
        good = finished(run)
        shutil.rmtree(part, ignore_errors=True)
        last = good[-1] if good else "none"
        raise TrainingError(
            f"cannot save the checkpoint of step {step}: {error}; last good checkpoint: {last}"
        ) from error
    accelerator.wait_for_everyone()
    return target


def restore(accelerator: Accelerator, checkpoint: Path, fixed: Mapping[str, Any]) -> int:
    """Load a checkpoint into what accelerate prepared; returns the steps done.

    Raises TrainingError if the run it belongs to saw other samples or in another order, or, with DeepSpeed, if its
    optimiser's state is split for another number of processes.
    """
    saved = json.loads((checkpoint / "progress.json").read_text())
    step = saved.pop("step")
    differing = [
        f"{key}: {saved.get(key)} there, {value} now" for key, value in fixed.items() if saved.get(key) != value
    ]
    if differing:
        raise TrainingError(
            f"{checkpoint} cannot be resumed as this run is set: {'; '.join(differing)}. "
            "Keep seed, data and global batch = batch_size x gradient_accumulation_steps x processes (DeepSpeed: the "
            "processes too); "
            "or start a new run from its model/ folder"
        )
    accelerator.load_state(str(checkpoint / "state"))
    return step

"""Checkpoints of a training run: `checkpoints/step-00001000/` with everything to resume from, and to infer with.

* `state/`  trained parameters, moments and averages (mige/training/state.py); with ZeRO-2 DeepSpeed's own files
* `model/`  a pipeline folder for inference (averaged parameters if there are any); with LoRA `lora/` in its place
* `progress.json`  steps done, what must not change on resume (mige/training/resume.py), the held-out loss

A checkpoint is copied to host memory, and written while training goes on, under another name; it is renamed when whole,
so a half-written one is never picked up. Those in `checkpoints/` are one line: each was reached from the one before.
Resuming from an older one moves the later ones into `checkpoints/abandoned-N/`, where nothing reads or deletes them.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from mige.training.errors import TrainingError
from mige.training.state import TrainingState, share
from mige.utils.files import sync_folder, write_text

PATIENCE = timedelta(hours=2)
"""How long processes wait for one of them, which writes a checkpoint or makes samples. torch's own is 10 minutes."""

# Of one process: that is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_FAILURES = (Exception, dcp.CheckpointException)  # which is none: it is derived from BaseException
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


def best_checkpoint(run: Path) -> Path | None:
    """The one of the run's line with the least held-out loss; None where none was measured, or none is a number."""
    losses = {one: json.loads((one / "progress.json").read_text(encoding="utf-8")).get("held_out")
              for one in list_checkpoints(run)}  # fmt: skip
    measured = [one for one, loss in losses.items() if loss is not None and math.isfinite(loss)]  # NaN: never less
    return min(measured, key=losses.__getitem__, default=None)


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


class _KeptStager(DefaultStager):
    """Kept for the next checkpoint, with its memory: that of torch 2.11 lets go of everything after each copy."""

    def __init__(self, options: StagingOptions):
        super().__init__(options)
        self._state_dict_stager.close = lambda: None  # the memory goes with the process


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, while training goes on. All calls are by every process.

    Args:
        keep: how many stay, of the line's newest; the best stays too.
    """

    def __init__(self, accelerator: Accelerator, run: Path, keep: int):
        self.accelerator, self.run, self.keep = accelerator, run, keep
        cuda = accelerator.device.type == "cuda"
        self.stager = _KeptStager(StagingOptions(cuda, False, False, cuda))  # pinned
        # One of its own: the writing thread's messages must not mix with those of the training.
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: tuple[int, Future] | None = None

    def save(
        self,
        step: int,
        invariants: Mapping[str, Any],
        state: Mapping[str, Tensor] | None,
        export: Callable[[Path], Callable[[], None]],
        held_out: float | None = None,
    ) -> None:
        """Copy a checkpoint to host memory and begin to write it; the one before is waited for.

        Args:
            invariants: facts that must be the same on resume, JSON.
            state: tensors by name, [...] each, of `TrainingState`; None: accelerate writes its own (ZeRO-2).
            export: prepares the inference part for a folder; what it returns writes it, in the main process alone.
            held_out: the loss by which the best checkpoint is found; None: not measured.

        Raises TrainingError if writing fails (a full disk); earlier checkpoints are untouched.
        """
        self.wait()
        part = self.run / "checkpoints" / f".step-{step:08d}.part"
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
                part.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            write_model, written = export(part), None
            if state is None:
                self.accelerator.save_state(str(part / "state"))
                self.accelerator.wait_for_everyone()
            else:
                written = self._begin(part / "state", state)
        except _FAILURES as error:  # torch and safetensors report a full disk in several types
            raise self._failed(step, error) from error

        progress = {"step": step, "invariants": dict(invariants), "held_out": held_out}

        def finish() -> None:
            if written is not None:
                written.result()  # of all processes
            if self.accelerator.is_main_process:
                write_model()
                self._rename(part, progress)

        self.pending = step, self.thread.submit(finish)

    def _begin(self, folder: Path, state: Mapping[str, Tensor]) -> Future:
        mine = share(state, self.accelerator.process_index, self.accelerator.num_processes)
        return dcp.async_save(
            mine,
            storage_writer=dcp.FileSystemWriter(folder),
            process_group=self.group,
            async_stager=self.stager,
            no_dist=self.group is None,
        )

    def _rename(self, part: Path, progress: Mapping[str, Any]) -> None:
        write_text(part / "progress.json", json.dumps(progress, indent=2) + "\n")
        part.rename(part.with_name(part.name[1 : -len(".part")]))
        sync_folder(part.parent)
        best = best_checkpoint(self.run)
        for old in list_checkpoints(self.run)[: -self.keep]:
            if old != best:
                shutil.rmtree(old)

    def check(self) -> None:
        """Raise TrainingError if the checkpoint that is being written has failed; waits for nothing."""
        if self.pending is not None and self.pending[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the last one is whole. Raises TrainingError if it could not be written."""
        if self.pending is None:
            return
        (step, future), self.pending = self.pending, None
        try:
            future.result()
        except _FAILURES as error:
            raise self._failed(step, error) from error

    def _failed(self, step: int, error: Exception) -> TrainingError:
        good = newest_checkpoint(self.run)
        if self.accelerator.is_main_process:
            shutil.rmtree(self.run / "checkpoints" / f".step-{step:08d}.part", ignore_errors=True)
        return TrainingError(
            f"cannot save the checkpoint of step {step}: {_cause(error)}; last good checkpoint: {good or 'none'}"
        )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, state: TrainingState) -> None:
    """Load a checkpoint's state. Raises TrainingError if it cannot be read. Version 0.1's are accelerate's files."""
    folder = checkpoint / "state"
    try:
        if (folder / ".metadata").is_file():
            state.load(folder)
        else:
            accelerator.load_state(str(folder))
    except _FAILURES as error:  # a file that is cut off or missing is reported in several types
        cause = _cause(error)
        raise TrainingError(
            f"{folder} cannot be loaded: {type(cause).__name__}: {cause}; resume from another checkpoint"
        ) from error


def _cause(error: BaseException) -> BaseException:
    """The first process's own error: the text of what torch makes of all is a traceback."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error


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

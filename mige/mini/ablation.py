"""The ablations: one thing of MIGE-mini changed at a time, trained from several seeds, scored on the mini-bench.

A run is a variant and a seed. It trains in a process of its own and keeps a checkpoint at every quarter; all of them
are scored, and its scores enter OUT/scores.jsonl in one piece: a run that is in there is finished.

Neither the learning rate (constant after its warm-up) nor the average of the weights depends on how many steps are
still to come: a checkpoint is what a shorter run would have ended with. Hence two fair comparisons with one run each:

* equal compute: as many steps.
* equal samples: a variant that trains on a share of the joint mixture has seen, at that share of its steps, as many
  samples of those tasks as the joint run at its end.
"""

import fcntl
import functools
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mige import config
from mige.checkpoints.folder import verify
from mige.config import Config
from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.cases import SEED, make_cases
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench
from mige.mini.ablation_scores import AblationError, digest, enter, finished, read_scores, read_settings, score_lines
from mige.mini.start import start_with
from mige.tasks import Task
from mige.training import checkpointing as training_state
from mige.training.trainer import PREEMPTED
from mige.utils.files import write_text

QUARTERS = 4  # checkpoints of a run that are scored
NO_MATTER = {"data": ("workers",), "train": ("pretrained", "seed", "log_every", "trackers", "held_out")}  # to any score
EVERY = (Task.SUBJECT, Task.EDIT, Task.SUBJECT_EDIT)


@dataclass(frozen=True)
class Variant:
    """What is trained: on which tasks of the joint mixture, and what is changed in the config; and what is scored."""

    label: str
    trains: tuple[Task, ...]
    scored: tuple[Task, ...]
    overrides: tuple[str, ...] = ()


VARIANTS: Mapping[str, Variant] = {
    "joint": Variant("joint", EVERY, EVERY),
    "subject_only": Variant("subject-driven only", (Task.SUBJECT,), (Task.SUBJECT,)),
    "edit_only": Variant("edits only", (Task.EDIT,), (Task.EDIT,)),
    "without_subject_edit": Variant("without subject edits", (Task.SUBJECT, Task.EDIT), (Task.SUBJECT_EDIT,)),
    "without_vae_features": Variant("without VAE features", EVERY, EVERY, ("model.fusion.vae_features=False",)),
    "text_only": Variant("edits only, text-only", (Task.EDIT,), (Task.EDIT,), ("model.fusion.num_queries=0",)),
}
"""Text-only is compared with `edit_only`: without images in the instruction the other tasks have no meaning."""


@dataclass(frozen=True)
class Plan:
    """Where and how all runs of a folder are made.

    Attributes:
        out: folder of settings.json, scores.jsonl and runs/.
        file, overrides: the config and what of it is overridden.
        model: checkpoint folder that all runs start from.
        trainer: the training script. per_kind: cases of each kind. sampler_steps, batch: of generation.
        keep_weights: don't delete checkpoints once they are scored.
    """

    out: Path
    file: Path
    overrides: tuple[str, ...]
    model: Path
    trainer: Path
    per_kind: int = 52
    sampler_steps: int = 10
    batch: int = 64
    keep_weights: bool = False

    @functools.cached_property
    def config(self) -> Config:
        """The config of the joint run; raises ConfigError, and AblationError if it does not suit."""
        loaded = config.load(self.file, self.overrides)
        steps, mixture = loaded.train.steps, loaded.data.world
        if steps % QUARTERS:
            raise AblationError(f"train.steps is {steps}, expected a multiple of {QUARTERS}: every quarter is scored")
        if loaded.train.cooldown:
            raise AblationError(f"train.cooldown is {loaded.train.cooldown}, expected 0: checkpoints in mid-run would "
                                "not be what shorter runs end with")  # fmt: skip
        for variant in VARIANTS.values():
            part = share(mixture, variant.trains)
            if not part or abs(part * QUARTERS - round(part * QUARTERS)) > 1e-6:
                raise AblationError(f"data.world: {', '.join(variant.trains)} make {part:.3f} of the mixture, expected "
                                    "a quarter, a half, three quarters or all: there are checkpoints")  # fmt: skip
        return loaded

    @property
    def steps(self) -> list[int]:
        """The steps whose checkpoints are scored."""
        return [self.config.train.steps * quarter // QUARTERS for quarter in range(1, QUARTERS + 1)]

    def folder(self, name: str, seed: int) -> Path:
        """The folder of a run."""
        return self.out / "runs" / f"{name}-{seed}"

    def settings(self) -> dict[str, Any]:
        """What decides the scores of a variant and a seed, in JSON; equal in folders that may be merged."""
        dumped, train = self.config.dump(), self.config.train
        if dumped["distillation"] is None:  # a student is no ablation, and older settings do not name it
            del dumped["distillation"]
        del dumped["train"]["precision"]
        if train.trainable != "lora":  # nor what adapters are
            dumped["train"] = {k: v for k, v in dumped["train"].items() if k == "lora_rank" or not k.startswith("lora")}
        dumped["train"]["param_dtype"] = train.param_dtype
        if dumped["data"]["world_name"] == "first":  # nor that there are two worlds
            del dumped["data"]["world_name"]
        if not dumped["data"]["shapes"]:  # nor that there are others than the square
            del dumped["data"]["shapes"], dumped["data"]["shape_block"]
        dumped["data"]["check_pictures"] = dumped["data"].pop("check_images")  # its name in the published settings
        for section, names in NO_MATTER.items():
            dumped[section] = {key: value for key, value in dumped[section].items() if key not in names}
        files = sorted(path for path in self.model.glob("*/*") if path.suffix in (".safetensors", ".json"))
        start = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
        how = {"per_kind": self.per_kind, "sampler_steps": self.sampler_steps, "bench_seed": SEED}
        precision = "bf16" if torch.cuda.is_available() and train.precision != "float32" else "float32"
        made = {**dumped, **how, "start": start, "precision": precision}
        return json.loads(json.dumps(made))


def share(mixture: Mapping[str, float], trained: Sequence[Task]) -> float:
    """The share of a mixture's samples that is of these tasks."""
    return sum(weight for kind, weight in mixture.items() if task_of(kind) in trained) / sum(mixture.values())


def kinds_of(mixture: Mapping[str, float], some: Sequence[Task]) -> list[str]:
    """The kinds of a mixture that are of these tasks, in its order."""
    return [kind for kind in mixture if task_of(kind) in some]


@functools.cache
def task_of(kind: str) -> Task:
    """The task that a kind of the world belongs to."""
    return tasks.make(kind, np.random.default_rng(0), sprites.split()[0]).task


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(plan: Plan, variants: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and score every run of these variants and seeds that is not finished, all variants of a seed first.

    Can be killed at any point and called again. Raises CheckpointError if the model to start from is not whole,
    AblationError if there is none, if the folder holds runs with other settings or is at work already, or if a training
    fails.
    """
    if not plan.model.exists():
        raise AblationError(f"{plan.model}: no model to start from; make it with train_scripts/start_ablation.py, or "
                            "name one with --from-model")  # fmt: skip
    verify(plan.model)  # before its digest enters the settings
    plan.out.mkdir(parents=True, exist_ok=True)
    with _alone(plan.out) as lock:
        setting = _settle(plan)
        for seed in seeds:
            for name in variants:
                if (name, seed) not in finished(read_scores(plan.out), plan.steps):
                    _train(plan, name, seed, lock)
                    enter(plan.out, name, seed, _score(plan, name, seed, setting))
                if not plan.keep_weights:
                    _tidy(plan.folder(name, seed), plan.steps)


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold the folder's lock; trainings inherit it, so one that outlives this process keeps others out."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AblationError(
                f"{out} is at work already: another tools/ablate.py, or a training that a killed one left behind. "
                "Wait for it or end it; to share the work take another folder and merge scores.jsonl"
            ) from error
        yield file.fileno()


def _settle(plan: Plan) -> str:
    """Write the settings of a new folder, or see that an old one has the same; returns their digest."""
    path, now = plan.out / "settings.json", plan.settings()
    if path.exists():
        there = read_settings(plan.out)
        if differing := list(_differing(there, now)):
            raise AblationError(f"{plan.out} holds runs with other settings ({'; '.join(differing)}): use another "
                                "folder, or the old settings")  # fmt: skip
    write_text(path, json.dumps(now, indent=2) + "\n")
    return digest(now)


def _differing(there: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        for key in sorted(there.keys() | now.keys()):
            yield from _differing(there.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif there != now:
        yield f"{where}: {there} there, {now} now"


def overrides(plan: Plan, name: str, seed: int) -> list[str]:
    """What of the config is overridden for a run."""
    variant, mixture = VARIANTS[name], plan.config.data.world
    own = {"data.world": {kind: mixture[kind] for kind in kinds_of(mixture, variant.trains)}}
    own |= {"train.pretrained": str(plan.folder(name, seed) / "start"), "train.seed": seed}
    own |= {"train.checkpoint_every": plan.steps[0]}
    own |= {"train.keep_checkpoints": plan.steps[-1]}  # all, or one saved at a SIGTERM would push out a quarter's
    return [*plan.overrides, *variant.overrides, *(f"{key}={value!r}" for key, value in own.items())]


def _train(plan: Plan, name: str, seed: int, lock: int) -> None:
    """Train to the last step, from the newest checkpoint if there is one."""
    folder, own = plan.folder(name, seed), overrides(plan, name, seed)
    if _step_name(plan.steps[-1]) in [checkpoint.name for checkpoint in training_state.list_checkpoints(folder)]:
        return  # stopped while it was scored
    if not (folder / "start").exists():
        start_with(plan.model, folder / "start", config.load(plan.file, own).model, seed)
    code = launch(plan.trainer, plan.file, folder, own, lock)
    if code == PREEMPTED:
        sys.exit(PREEMPTED)
    if code:
        raise AblationError(f"the training of {name}, seed {seed}, ended with exit code {code}: see {folder}/log.txt "
                            "and the lines above; the same command resumes from its newest checkpoint")  # fmt: skip


def launch(trainer: Path, file: Path, folder: Path, overrides: Sequence[str], *passed: int) -> int:
    """Train in a process of its own, which is told when this one is stopped and waited for; returns its exit code.

    One process and one card, our own child: signals reach it. `passed`: file descriptors that it inherits.
    """
    command = [sys.executable, str(trainer), str(file), "--output", str(folder), *overrides]
    child = subprocess.Popen(command, pass_fds=passed)
    try:
        return child.wait()
    finally:
        if child.poll() is None:  # we are being stopped
            child.terminate()
            child.wait()


def _score(plan: Plan, name: str, seed: int, setting: str) -> list[dict]:
    """The lines of a trained run."""
    folder, settings = plan.folder(name, seed), plan.config.train
    chosen = make_cases(plan.per_kind, kinds=kinds_of(plan.config.data.world, VARIANTS[name].scored))
    lines = []
    for step in plan.steps:
        model = folder / "checkpoints" / _step_name(step) / "model"
        pipeline = MIGEPipeline.from_pretrained(model, dtype=torch.float32)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        where = str(model.relative_to(plan.out))
        how = {"model": where, "batch": plan.batch, "steps": plan.sampler_steps}
        rows = bench.run(pipeline, chosen, folder / "bench" / _step_name(step), **how)
        facts = {"setting": setting, "variant": name, "seed": seed, "step": step}
        facts["samples"] = step * settings.batch_size * settings.gradient_accumulation_steps
        lines += [facts | line for line in score_lines(rows)]
    return lines


def _step_name(step: int) -> str:
    return f"step-{step:08d}"  # as `training_state` calls it


def _tidy(folder: Path, steps: Sequence[int]) -> None:
    """Delete the weights of a scored run, and the images of all checkpoints but the last."""
    for part in (folder / "start", folder / "checkpoints", *(folder / "bench" / _step_name(s) for s in steps[:-1])):
        if part.exists():
            shutil.rmtree(part)

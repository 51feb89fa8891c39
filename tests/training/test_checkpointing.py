"""Checkpoints are written while training goes on, whole or not at all; a failure is said; those of 0.1 are read."""

import json
import shutil
import threading
from datetime import timedelta

import pytest
import torch
from accelerate import PartialState
from test_resuming import SHORT, finished, line, run
from test_trainer import build, weights
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager

from mige.training import trainer as trainer_module
from mige.training.checkpointing import CheckpointWriter
from mige.training.errors import TrainingError

__all__ = ["finished", "run"]  # fixtures


def test_training_goes_on_while_a_checkpoint_is_written(tiny_model, finished, tmp_path, monkeypatch):
    """The first is not whole before the step after the next has been taken; what it holds is of its own step."""
    further, rename = threading.Event(), CheckpointWriter._rename

    def wait_for_training(self, part, progress):
        assert further.wait(60), "training waits for the checkpoint"
        rename(self, part, progress)

    monkeypatch.setattr(CheckpointWriter, "_rename", wait_for_training)
    trainer = build(tiny_model, tmp_path / "run", *SHORT)
    step = trainer._train_step

    def spy(batches):
        step(batches)
        if trainer.step == 3:
            assert line(tmp_path / "run") == []
            further.set()

    trainer._train_step = spy
    assert trainer.run() == 0
    assert line(tmp_path / "run") == ["step-00000002", "step-00000004"]
    for name in line(tmp_path / "run"):
        there, here = (weights(one / "checkpoints" / name) for one in (finished, tmp_path / "run"))
        assert all(torch.equal(there[key], here[key]) for key in there)


def test_the_second_is_written_where_torch_closes_the_stager(tiny_model, finished, tmp_path, monkeypatch):
    """As torch 2.11 does; later versions leave it to the owner."""
    stage = DefaultStager._stage

    def closing(self, *args, **kwargs):
        staged = stage(self, *args, **kwargs)
        self._state_dict_stager.close()
        return staged

    monkeypatch.setattr(DefaultStager, "_stage", closing)
    assert build(tiny_model, tmp_path / "run", *SHORT).run() == 0
    assert line(tmp_path / "run") == ["step-00000002", "step-00000004"]
    there, here = (weights(one / "checkpoints" / "step-00000004") for one in (finished, tmp_path / "run"))
    assert all(torch.equal(there[key], here[key]) for key in there)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tiny_model, tmp_path, monkeypatch):
    rename = CheckpointWriter._rename

    def full(self, part, progress):
        if progress["step"] == 4:
            raise OSError("no space left")
        rename(self, part, progress)

    monkeypatch.setattr(CheckpointWriter, "_rename", full)
    with pytest.raises(TrainingError, match=r"the checkpoint of step 4: no space left; last good checkpoint: .*00002"):
        build(tiny_model, tmp_path / "run", *SHORT, "train.steps=40").run()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_only_what_is_trained_is_saved(tiny_model, tmp_path):
    """T13: with the text encoder frozen no tensor of it, nor of the tower; with adapters these alone."""
    short = ("train.steps=1", "train.batch_size=1", "train.sample_every=0")
    build(tiny_model, tmp_path / "frozen", *short, "train.trainable=text_encoder_frozen").run()
    saved = weights(tmp_path / "frozen" / "checkpoints" / "step-00000001")
    assert "transformer.proj_out.weight" in saved and not any("text_encoder" in name for name in saved)
    build(tiny_model, tmp_path / "lora", *short, "train.trainable=lora").run()
    state = tmp_path / "lora" / "checkpoints" / "step-00000001" / "state"
    saved = dcp.FileSystemReader(state).read_metadata().state_dict_metadata
    assert saved and all("lora_" in name for name in saved)  # parameters and moments


def test_a_checkpoint_of_version_0_1_resumes(tiny_model, run, finished):
    """It holds accelerate's own files, and names its sharding."""
    old = run / "checkpoints" / "step-00000002"
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    saving = build(tiny_model, run, *SHORT)
    saving._load(old)
    shutil.rmtree(old / "state")
    saving.accelerator.save_state(str(old / "state"))
    assert (old / "state" / "model.safetensors").is_file()
    progress = json.loads((old / "progress.json").read_text())
    progress["invariants"]["sharding"] = "none"
    (old / "progress.json").write_text(json.dumps(progress))
    assert build(tiny_model, run, *SHORT).run() == 0
    there, here = (weights(one / "checkpoints" / "step-00000004") for one in (finished, run))
    assert all(torch.equal(there[key], here[key]) for key in there)
    progress["invariants"]["sharding"] = "FSDP2"
    (old / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(TrainingError, match="sharding: FSDP2 there, none now"):
        build(tiny_model, run, *SHORT).run(old)


def test_processes_wait_for_hours_for_one_that_writes_or_samples(tiny_model, tmp_path, monkeypatch):
    """T12: torch's own patience is 10 minutes."""
    asked = []
    monkeypatch.setattr(trainer_module, "PartialState", lambda **given: asked.append(given) or PartialState(**given))
    build(tiny_model, tmp_path / "run", *SHORT)
    assert asked[0]["timeout"] >= timedelta(hours=1)

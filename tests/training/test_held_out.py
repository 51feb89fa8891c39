"""The held-out loss: of the averaged weights, alike at every checkpoint, by task and quartile; the best one stays."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_resuming import line
from test_trainer import TRAIN, build, losses

from mige import config
from mige.data.records import BadRecordsError
from mige.diffusion.gaussian import Diffusion
from mige.inference.pipeline import MIGEPipeline
from mige.training.checkpointing import best_checkpoint
from mige.training.held_out import HeldOutLoss

HELD_OUT = f"train.held_out=[{str(TRAIN)!r}]"
SHORT = ("train.steps=3", "train.checkpoint_every=1", "train.batch_size=2", "train.keep_checkpoints=9")


def told(run) -> list[dict]:
    return [json.loads(row) for row in (run / "held_out.jsonl").read_text().splitlines()]


def test_it_is_that_of_the_weights_that_are_exported_and_changes_nothing(tiny_model, tmp_path):
    run, averaged = tmp_path / "run", "train.ema=0.9"
    assert build(tiny_model, run, *SHORT, HELD_OUT, averaged).run() == 0
    rows = told(run)
    assert [row["step"] for row in rows] == [1, 2, 3] and len({row["held_out/loss"] for row in rows}) == 3
    pipeline = MIGEPipeline.from_pretrained(run / "checkpoints" / "step-00000002" / "model")
    settings = config.load("configs/tiny.py", [HELD_OUT, "data.size=64", "train.batch_size=5"])
    held_out = HeldOutLoss(settings, pipeline, Diffusion())
    again = held_out.measure(pipeline.model, pipeline.vae, None, Accelerator(cpu=True))
    assert again == pytest.approx({name: value for name, value in rows[1].items() if name != "step"}, rel=1e-4)
    assert {"held_out/loss/edit", "held_out/loss/subject", "held_out/loss/t 0-249"} <= again.keys()
    quartiles = [value for name, value in again.items() if "/t " in name]
    assert len(quartiles) == 4 and sum(quartiles) / 4 == pytest.approx(again["held_out/loss"])  # each record in each
    assert build(tiny_model, tmp_path / "without", *SHORT, averaged).run() == 0
    assert losses(run) == losses(tmp_path / "without")


def test_every_record_is_asked_in_every_quarter_with_the_same_noise(tiny_model):
    settings = config.load("configs/tiny.py", [HELD_OUT, "data.size=64"])
    one, other = (HeldOutLoss(settings, MIGEPipeline.from_pretrained(tiny_model), Diffusion()) for _ in range(2))
    for number in range(len(one.records)):
        sample, again = one.records[number], other.records[number]
        assert [time // 250 for time in sample.times] == [0, 1, 2, 3] and not sample.drop_text
        assert sample.times == again.times and torch.equal(sample.noise, again.noise)
    assert len({one.records[number].id for number in range(len(one.records))}) == len(TRAIN.read_text().splitlines())


@pytest.mark.parametrize("processes", [1, 4])
def test_processes_share_the_records(tiny_model, processes):
    """All as many batches; what one is shown twice for that weighs nothing."""
    settings = config.load("configs/tiny.py", [HELD_OUT, "data.size=64", "train.batch_size=2"])
    held_out = HeldOutLoss(settings, MIGEPipeline.from_pretrained(tiny_model), Diffusion())
    shares = [list(held_out._batches(SimpleNamespace(process_index=rank, num_processes=processes)))
              for rank in range(processes)]  # fmt: skip
    seen = [name for share in shares for batch, weight_B in share
            for name, weight in zip(batch.ids, weight_B.tolist(), strict=True) if weight]  # fmt: skip
    assert len({len(share) for share in shares}) == 1
    assert sorted(seen) == sorted(held_out.records[number].id for number in range(len(held_out.records)))


def test_the_best_checkpoint_stays_beside_the_newest(tiny_model, tmp_path, monkeypatch):
    measured = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(HeldOutLoss, "measure", lambda *_: {"held_out/loss": next(measured)})
    run = tmp_path / "run"
    build(tiny_model, run, *SHORT[1:3], HELD_OUT, "train.steps=4", "train.keep_checkpoints=1").run()
    assert line(run) == ["step-00000002", "step-00000004"] and best_checkpoint(run).name == "step-00000002"
    build(tiny_model, run, *SHORT[1:3], "train.steps=5", "train.keep_checkpoints=1").run()  # from the newest
    assert line(run) == ["step-00000002", "step-00000005"]
    assert [row["step"] for row in told(run)] == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in enumerate([float("nan"), 2.0, 1.0, None, float("inf")], start=1):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps({"held_out": loss}))
    assert best_checkpoint(tmp_path).name == "step-00000003"


def test_records_that_cannot_be_used_are_refused_before_the_first_step(tiny_model, tmp_path):
    with pytest.raises(BadRecordsError, match=r"none\.json"):
        build(tiny_model, tmp_path / "run", "train.held_out=['none.json']")
    assert not (tmp_path / "run").exists()

"""What a resumed run may change and what not, lines of checkpoints, and what a refused start leaves alone."""

import importlib.util
import json
import re
import shutil
import signal

import pytest
import torch
from processes import start_python
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import ROOT, TRAIN, build, losses, metrics, weights

from mige import config
from mige.checkpoints.errors import CheckpointError
from mige.data.records import BadRecordsError
from mige.inference.pipeline import MIGEPipeline
from mige.training import checkpointing, sampling
from mige.training.errors import TrainingError
from mige.training.trainer import PREEMPTED, Trainer
from mige.utils.files import folder_lock

SHORT = ("train.steps=4", "train.checkpoint_every=2", "train.batch_size=2", "train.keep_checkpoints=9")
SAMPLES = (f"train.sample_records=['{ROOT}/example_data/subject.json']", "train.sample_steps=1")


def line(run) -> list[str]:
    return [path.name for path in checkpointing.list_checkpoints(run)]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A run of four steps with two checkpoints; copy it."""
    run = tmp_path_factory.mktemp("resuming") / "run"
    assert build(tiny_model, run, *SHORT).run() == 0
    return run


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# ---- T1 ----


def test_another_accumulation_of_the_same_global_batch_equals_never_stopping(tiny_model, tmp_path):
    """Saved after three steps of one micro-batch: accelerate's own counter says 3, in the middle of a window of 2."""
    small = ("train.checkpoint_every=3", "train.eps=1e-2", "train.max_grad_norm=100")
    build(tiny_model, tmp_path / "whole", *small, "train.steps=5", "train.batch_size=4").run()
    build(tiny_model, tmp_path / "parts", *small, "train.steps=3", "train.batch_size=4").run()
    more = ("train.steps=5", "train.batch_size=2", "train.gradient_accumulation_steps=2")
    build(tiny_model, tmp_path / "parts", *small, *more).run()
    whole, parts, start = (weights(tmp_path / name / "checkpoints" / f"step-0000000{step}")
                           for name, step in (("whole", 5), ("parts", 5), ("whole", 3)))  # fmt: skip
    moved = sum((whole[name] - start[name]).square().sum() for name in whole).sqrt()
    apart = sum((whole[name] - parts[name]).square().sum() for name in whole).sqrt()
    assert moved > 0 and apart < 1e-3 * moved
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


# ---- T5, T19 ----


def test_an_older_checkpoint_starts_a_new_line(tiny_model, run):
    old = run / "checkpoints" / "step-00000002"
    assert build(tiny_model, run, *SHORT[:1], "train.checkpoint_every=1", "train.keep_checkpoints=9",
                 "train.batch_size=2", "train.steps=3").run(old) == 0  # fmt: skip
    assert line(run) == ["step-00000002", "step-00000003"]  # not the 4 of before, which nothing has deleted
    assert [path.name for path in (run / "checkpoints" / "abandoned-1").iterdir()] == ["step-00000004"]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    trainer = build(tiny_model, run, *SHORT)
    assert trainer.run() == 0 and "step-00000003" in (run / "log.txt").read_text().splitlines()[-2]
    assert line(run) == ["step-00000002", "step-00000003", "step-00000004"]


def test_an_abandoned_checkpoint_does_not_prune_new_ones(tiny_model, run):
    old = run / "checkpoints" / "step-00000002"
    build(tiny_model, run, *SHORT[2:3], "train.steps=3", "train.keep_checkpoints=1").run(old)
    assert line(run) == ["step-00000003"]


def test_killed_before_the_new_line_has_saved_it_is_still_the_line(tiny_model, run, monkeypatch):
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(Trainer, "_train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        build(tiny_model, run, *SHORT).run(run / "checkpoints" / "step-00000002")
    assert line(run) == ["step-00000002"]
    trainer = build(tiny_model, run, *SHORT)
    trainer.run()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_run_abandons_this_one(tiny_model, run, finished):
    build(tiny_model, run, *SHORT, "train.steps=3").run(finished / "checkpoints" / "step-00000002")
    assert line(run) == ["step-00000003"]
    assert len(list((run / "checkpoints" / "abandoned-1").iterdir())) == 2


def test_a_run_whose_checkpoints_are_all_abandoned_does_not_start_anew(tiny_model, run, finished, monkeypatch):
    """Killed after it had resumed from another run's checkpoint, before it saved one of its own."""
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(Trainer, "_train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        build(tiny_model, run, *SHORT).run(finished / "checkpoints" / "step-00000002")
    assert line(run) == [] and len(metrics(run)) == 2
    with pytest.raises(TrainingError, match=f"{run}: .* would start anew: .*abandoned-1/step-00000004"):
        build(tiny_model, run, *SHORT)
    assert len(metrics(run)) == 2
    assert build(tiny_model, run, *SHORT, resume=finished / "checkpoints" / "step-00000002")


def test_what_belongs_to_abandoned_steps_is_cut_and_a_renamed_run_samples_again(tiny_model, tmp_path):
    run, each = tmp_path / "first", ("train.sample_every=1", "train.checkpoint_every=1", *SAMPLES, *SHORT[2:])
    tracked = (*each, "train.trackers=['tensorboard']")
    build(tiny_model, run, *tracked, "train.steps=2").run()
    images = run / "samples" / "step-00000002" / "images"
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    (run / "samples" / "step-00000009").mkdir()  # of a timeline that had gone further
    run = run.rename(tmp_path / "second")
    (run / "samples" / "notes").mkdir()  # somebody's own
    build(tiny_model, run, *tracked, "train.steps=2", "train.learning_rate=1e-2").run(run / "checkpoints/step-00000001")
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["notes", "step-00000001", "step-00000002"]
    after = {path.name: path.read_bytes() for path in (run / "samples/step-00000002/images").iterdir()}
    assert before.keys() == after.keys() and before != after
    (events,) = {path.parent for path in run.rglob("events.out.*") if "mige" in str(path.parent)}
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2]
    assert [event.value for event in read.Scalars("loss")] == pytest.approx([row["loss"] for row in metrics(run)])


# ---- T9 ----


def other_data(tmp_path, change) -> str:
    rows = [json.loads(text) for text in TRAIN.read_text().splitlines()]
    change(rows)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"file": str(tmp_path / "train.jsonl"), "weight": 1.0, "root": str(TRAIN.parent)}
    return f"data.sets=[{one!r}]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.optimizer=muon", "optimizer: adamw there, muon now"),
        ("train.weight_decay=0.5", "weight_decay: 0.03 there, 0.5 now"),
        ("train.betas=[0.8,0.9]", r"betas: \[0.9, 0.999\] there, \[0.8, 0.9\] now"),
        ("train.seed=5", "seed: 0 there, 5 now"),
        ("train.batch_size=1", "global_batch_size: 2 there, 1 now"),
        ("train.noise_levels=2", "noise_levels: 1 there, 2 now"),
        ("train.snr_gamma=5.0", "snr_gamma: None there, 5.0 now"),
        ("train.ema=0.9", "ema: None there, 0.9 now"),
        ("train.trainable=text_encoder_frozen", "trainable: full there, text_encoder_frozen now"),
        ("train.trainable=lora", "trainable: full there, lora now; lora_rank: None there, 16 now"),
        ("data.drop_text=0.5", "drop_text: 0.05 there, 0.5 now"),
        ("data.size=128", "image_size: 64 there, 128 now"),
    ],
)
def test_what_must_stay_is_named_with_both_values(tiny_model, run, change, said):
    before = (run / "config.json").read_bytes(), (run / "log.txt").read_bytes(), metrics(run)
    with pytest.raises(TrainingError, match=f"step-00000004 cannot be resumed as this run is set: .*{said}"):
        build(tiny_model, run, *SHORT, "train.steps=5", change).run()
    assert ((run / "config.json").read_bytes(), (run / "log.txt").read_bytes(), metrics(run)) == before


@pytest.mark.parametrize(
    "change", [lambda rows: rows[0].update(id="other"), lambda rows: rows.reverse(), lambda rows: rows.pop()]
)
def test_other_data_is_refused(tiny_model, run, tmp_path, change):
    with pytest.raises(TrainingError, match=r"set_0: \{'file': 'train.jsonl', 'records': \d+.* there, \{'file'.* now"):
        build(tiny_model, run, *SHORT, "train.steps=5", other_data(tmp_path, change)).run()


def test_an_image_of_the_same_name_in_another_folder_is_other_data(tiny_model, tmp_path):
    rows = [json.loads(text) for text in TRAIN.read_text().splitlines()]
    data = shutil.copytree(TRAIN.parent, tmp_path / "data")
    one = {"file": str(data / TRAIN.name), "weight": 1.0}
    short = ("train.steps=1", "train.batch_size=1", f"data.sets=[{one!r}]")
    assert build(tiny_model, tmp_path / "run", *short).run() == 0
    place = data / rows[0]["image"]
    (data / "more").mkdir()
    shutil.copy(place, data / "more")
    rows[0]["image"] = f"more/{place.name}"
    (data / TRAIN.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError, match="set_0: "):
        build(tiny_model, tmp_path / "run", *short, "train.steps=2").run()


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_another_base_under_what_is_trained_is_refused(tiny_model, tmp_path, part):
    """Adapters alone are trained: what lies below them is not in their state."""
    short = ("train.trainable=lora", "train.batch_size=1")
    assert build(tiny_model, tmp_path / "run", *short, "train.steps=1").run() == 0
    other = shutil.copytree(tiny_model, tmp_path / "other")
    assert build(other, tmp_path / "run", *short, "train.steps=2").run() == 0  # the same, elsewhere
    if part == "tokenizer":
        path = other / part / "tokenizer.json"
        told = json.loads(path.read_text())
        told["model"]["vocab"][-2:] = told["model"]["vocab"][:-3:-1]
        path.write_text(json.dumps(told))
    else:
        (path,) = (other / part).glob("*.safetensors")
        state = load_file(path)
        state[min(state)] *= 1.5
        save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=r"frozen: [0-9a-f]{16} there, [0-9a-f]{16} now"):
        build(other, tmp_path / "run", *short, "train.steps=3").run()


def test_what_may_change(tiny_model, run, tmp_path):
    """docs/training.md, "Resuming": the schedule, what is logged, workers, and where the files lie."""
    more = ("train.steps=5", "train.learning_rate=1e-4", "train.warmup=1", "train.cooldown=2",
            "train.max_grad_norm=2.0",
            "train.lr_reference_batch=2", "train.log_every=1", "train.checkpoint_every=5", "train.keep_checkpoints=1",
            "data.check_images=False", other_data(tmp_path, lambda rows: None))  # fmt: skip
    assert build(tiny_model, run, *SHORT, *more).run() == 0
    assert metrics(run)[-1]["step"] == 5 and metrics(run)[-1]["lr"] < 1e-4


def test_the_mixture_is_compared(tiny_model, tmp_path):
    world = ("data.sets=[]", "train.steps=1", "train.batch_size=1")
    build(tiny_model, tmp_path / "run", *world, "data.world={'add': 1, 'remove': 1}").run()
    with pytest.raises(TrainingError, match=r"world: \[\['add', 1.0\], \['remove', 1.0\]\] there, \[\['add', 1.0\], "):
        build(tiny_model, tmp_path / "run", *world, "data.world={'add': 1, 'remove': 2}").run()


# ---- T8, T10, T21, T22, T11 ----


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ("data.sets=[]", config.ConfigError, "data.sets is empty, and so is data.world"),
        ("data.sets=[{'file': 'none.jsonl', 'weight': 1.0}]", BadRecordsError, "none.jsonl"),
        ("train.pretrained='nowhere'", (CheckpointError, OSError), "nowhere"),
        ("train.trackers=['wandb']", config.ConfigError, "'wandb' is not installed: pip install wandb"),
        ("train.trackers=['tensorbord']", config.ConfigError, "'tensorbord', expected some of .*tensorboard"),
        ("train.sample_every=9 train.sample_records=['none.json']", BadRecordsError, "none.json"),
        ("train.pretrained=None train.tokenizer='nowhere'", config.ConfigError, "train.tokenizer='nowhere' cannot"),
        ("model.fusion.eps=1e-5", config.ConfigError, "model.fusion.eps"),
    ],
)
def test_all_that_is_named_is_opened_before_anything_is_written(tiny_model, tmp_path, change, error, said):
    with pytest.raises(error, match=said):
        build(tiny_model, tmp_path / "run", *SHORT, *re.split(r" (?=data\.|train\.)", change)).run()
    assert not (tmp_path / "run").exists()


def test_an_optimiser_that_is_not_installed(tiny_model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(config.ConfigError, match=r"'adamw_8bit', which bitsandbytes brings: pip install 'mige\[bits"):
        build(tiny_model, tmp_path / "run", *SHORT, "train.optimizer=adamw_8bit")
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_no_folder(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "dangling"):
        with pytest.raises(config.ConfigError, match=r"--output .* is not a folder"):
            build(tiny_model, path, *SHORT)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no progress.json in it"),
        (lambda folder: (folder.mkdir(), (folder / "progress.json").write_text("{")), "cannot be read"),
        (lambda folder: (folder.mkdir(), (folder / "progress.json").write_text('{"step": 4}')), "an earlier version"),
    ],
)
def test_what_is_no_checkpoint_is_named(tiny_model, run, tmp_path, make, said):
    make(tmp_path / "given")
    before = metrics(run)
    with pytest.raises(TrainingError, match=f"given.*{said}"):
        build(tiny_model, run, *SHORT).run(tmp_path / "given")
    assert metrics(run) == before and line(run) == ["step-00000002", "step-00000004"]


def test_a_cut_state_is_named(tiny_model, run):
    (state,) = (run / "checkpoints" / "step-00000004" / "state").glob("*.distcp")
    state.write_bytes(state.read_bytes()[:1000])
    (run / "samples" / "step-00000009").mkdir(parents=True)  # would be cut, as later than step 4
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(TrainingError, match=r"step-00000004/state cannot be loaded: .*resume from another checkpoint"):
        build(tiny_model, run, *SHORT, "train.steps=5").run()
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == {path: data for path, data in before.items() if path.name != ".lock"}
    assert (run / "samples" / "step-00000009").is_dir()


@pytest.mark.processes
def test_one_training_a_folder(tiny_model, run):
    hold = "import sys; from pathlib import Path; from mige.utils.files import folder_lock\n" \
           "with folder_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"  # fmt: skip
    with start_python("-c", hold, run, stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TrainingError, match=f"{run}: another run writes here"):
            build(tiny_model, run, *SHORT)
        other.stdin.close()


def test_a_failing_sample_loses_nothing(tiny_model, tmp_path, monkeypatch):
    run, often = tmp_path / "run", ("train.sample_every=1", *SAMPLES, "train.checkpoint_every=9", "train.steps=3")
    with monkeypatch.context() as broken:
        broken.setattr(sampling.inference, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
        with pytest.raises(TrainingError, match="sampling at step 1 failed: no memory; the checkpoint of this step is"):
            build(tiny_model, run, *SHORT[2:], *often).run()
    assert line(run) == ["step-00000001"]
    assert build(tiny_model, run, *SHORT[2:], *often).run() == 0


# ---- T6, T16, T18 ----


def test_adapters_over_bfloat16_are_float32(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path / "run", "train.trainable=lora", "train.precision=bfloat16", *SHORT)
    assert {p.dtype for p in trainer.trained} == {torch.float32}
    assert trainer.plain.transformer.proj_out.weight.dtype is torch.bfloat16


def test_samples_are_of_the_weights_the_checkpoint_ships(tiny_model, tmp_path):
    run = tmp_path / "run"
    build(tiny_model, run, *SHORT[2:], "train.steps=2", "train.ema=0.9", "train.learning_rate=0.1", "train.warmup=0",
          "train.max_grad_norm=100", "train.sample_every=2", *SAMPLES).run()  # fmt: skip
    pipeline = MIGEPipeline.from_pretrained(run / "checkpoints" / "step-00000002" / "model")
    settings = config.load(ROOT / "configs" / "tiny.py", ["train.sample_every=2", *SAMPLES]).train
    records = sampling.load_sample_records(settings, pipeline)
    sampling.sample(records, pipeline, settings, tmp_path / "again", 2)
    for path in (run / "samples" / "step-00000002" / "images").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "images" / path.name).read_bytes()


def test_a_gradient_that_is_not_finite_names_all_records_of_the_step(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path / "run", "train.steps=1", "train.batch_size=2",
                    "train.gradient_accumulation_steps=2")  # fmt: skip
    trainer.plain.transformer.proj_out.bias.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match="the gradient is not finite") as told:
        trainer.run()
    for number in range(4):
        assert trainer.dataset.record(number).where in str(told.value)


def test_a_loss_that_is_not_finite_names_its_record_alone(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path / "run", "train.steps=1", "train.batch_size=3", "train.noise_levels=2")
    loss = trainer._loss

    def poisoned(batch):
        found = loss(batch)
        found.loss.mse.data[4] = float("nan")  # the second sample at the second noise level
        return found

    trainer._loss = poisoned
    with pytest.raises(TrainingError, match="the loss is not finite") as told:
        trainer.run()
    named = [trainer.dataset.record(number).where in str(told.value) for number in range(3)]
    assert named == [False, True, False]


def test_an_image_that_went_away_is_named(tiny_model, tmp_path):
    rows = [json.loads(text) for text in TRAIN.read_text().splitlines()]
    folder = shutil.copytree(TRAIN.parent, tmp_path / "data")
    one = {"file": str(folder / TRAIN.name), "weight": 1.0}
    trainer = build(
        tiny_model, tmp_path / "run", f"data.sets=[{one!r}]", "train.steps=9", f"train.batch_size={len(rows)}"
    )
    gone = trainer.dataset.record(0)
    gone.target.unlink()
    with pytest.raises(TrainingError, match="step 0: a sample cannot be read: ") as told:
        trainer.run()
    assert gone.where in str(told.value)


def test_seeds_up_to_the_last(tiny_model, tmp_path):
    assert build(tiny_model, tmp_path / "run", "train.steps=1", f"train.seed={2**32 - 1}").run() == 0
    assert len(losses(tmp_path / "run")) == 1
    with folder_lock(tmp_path / "run"):
        pass  # given back


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_each_way_of_being_stopped_saves_and_resumes(tiny_model, tmp_path, name):
    """One process alone, which the script becomes: Ctrl-C reaches the training itself."""
    trainer, step = build(tiny_model, tmp_path / "run", "train.steps=9", "train.batch_size=1"), Trainer._train_step

    def stopped(batches):
        if trainer.step == 1:
            signal.raise_signal(getattr(signal, name))
        return step(trainer, batches)

    trainer._train_step = stopped
    assert trainer.run() == PREEMPTED
    saved = metrics(tmp_path / "run")[-1]["step"]
    assert line(tmp_path / "run") == [f"step-{saved:08d}"] and 2 <= saved <= 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

"""Real training runs of the tiny model on the CPU: resuming, many processes, refusals, the way back to inference."""

import itertools
import json
import logging
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import run_here
from processes import ServedProcess, environment, run_python, start_python
from torch.distributed import checkpoint as dcp

from mige import config
from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import merge_lora
from mige.data.records import BadRecordsError
from mige.inference.pipeline import MIGEPipeline
from mige.training import checkpointing as training_state
from mige.training import metrics as progress
from mige.training.checkpointing import TrainingError
from mige.training.optimizers import learning_rate
from mige.training.trainer import PREEMPTED, Trainer

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "example_data" / "train.jsonl"
BASE = ["train.sample_every=0", "train.log_every=1", "data.size=64"]


def overrides(model: Path, *more: str) -> list[str]:
    return [f"train.pretrained={str(model)!r}", f"data.sets=[dict(file={str(TRAIN)!r}, weight=1.0)]", *BASE, *more]


def build(model: Path, run: Path, *more: str, resume: Path | None = None) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    text = [o.replace("dict(file=", "{'file': ").replace(", weight=1.0)", ", 'weight': 1.0}") for o in
            overrides(model, *more)]  # fmt: skip
    return Trainer(config.load(ROOT / "configs" / "tiny.py", text), run, resume)


def command(model: Path, run: Path, *more: str) -> list[str]:
    text = [o.replace("dict(file=", "{'file': ").replace(", weight=1.0)", ", 'weight': 1.0}") for o in
            overrides(model, *more)]  # fmt: skip
    return ["train_scripts/train_mige.py", "configs/tiny.py", text[0], "--output", str(run), *text[1:]]


def start(model: Path, run: Path, *more: str) -> ServedProcess:
    """Training in a process with a group of its own."""
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return start_python(*command(model, run, *more), cwd=ROOT, start_new_session=True, **streams)


def torchrun(processes: int) -> list[object]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]


ON_CPU = environment() | {"ACCELERATE_USE_CPU": "true"}


def metrics(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in metrics(run)]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The trained parameters that a checkpoint holds."""
    reader = dcp.FileSystemReader(checkpoint / "state")
    saved = {name.removeprefix("parameters."): (name, torch.zeros(meta.size, dtype=meta.properties.dtype))
             for name, meta in reader.read_metadata().state_dict_metadata.items()
             if name.startswith("parameters.")}  # fmt: skip
    dcp.load(dict(saved.values()), storage_reader=reader, no_dist=True)
    return {name: tensor for name, (_, tensor) in saved.items()}


def wait_until(condition, process: ServedProcess, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


STEPS = ("train.steps=9", "train.checkpoint_every=3", "train.keep_checkpoints=2")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    process = start(tiny_model, run, *STEPS)  # a process like the others: threads decide the last bits
    assert process.wait() == 0, process.stderr.read()
    return run


@pytest.mark.processes
def test_a_run_killed_again_and_again_equals_one_that_never_stopped(tiny_model, tmp_path, uninterrupted):
    run = tmp_path / "killed"
    process = start(tiny_model, run, *STEPS)  # 1: in the middle of a step
    wait_until(lambda: len(metrics(run)) >= 4 and training_state.list_checkpoints(run), process)
    process.kill()
    process.wait()
    assert training_state.list_checkpoints(run)[-1].name == "step-00000003"

    process = start(tiny_model, run, *STEPS)  # 2: while a checkpoint is being written
    wait_until(lambda: any((run / "checkpoints").glob(".step-00000006.part")), process)
    process.kill()
    process.wait()
    left_over = list((run / "checkpoints").glob(".*.part"))
    assert training_state.list_checkpoints(run)[-1].name in (
        "step-00000003",
        "step-00000006",
    )  # never the half-written one
    assert left_over or training_state.list_checkpoints(run)[-1].name == "step-00000006"

    process = start(tiny_model, run, *STEPS, "data.workers=2")  # 3: asked to stop, as schedulers do it: workers too
    wait_until(lambda: len(metrics(run)) >= 7, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == PREEMPTED, process.stderr.read()

    process = start(tiny_model, run, *STEPS)
    assert process.wait() == 0, process.stderr.read()
    assert losses(run) == losses(uninterrupted)  # every step once, to the last bit
    got, want = (weights(r / "checkpoints" / "step-00000009") for r in (run, uninterrupted))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.processes
def test_the_newest_checkpoints_are_kept(uninterrupted):
    assert [path.name for path in training_state.list_checkpoints(uninterrupted)] == ["step-00000006", "step-00000009"]


@pytest.mark.processes
def test_the_run_folder(uninterrupted):
    saved = json.loads((uninterrupted / "config.json").read_text())
    assert saved["train"]["steps"] == 9
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert all(abs(line["loss"] - line["mse"] - line["vb"]) < 1e-5 * line["loss"] for line in lines)
    assert any("loss/subject_edit" in line for line in lines) and any("loss/t 0-249" in line for line in lines)


@pytest.mark.processes
def test_an_unforeseen_error_ends_the_workers_too(tiny_model, tmp_path):
    script = (
        "import sys; from pathlib import Path; from mige import config; from mige.training import trainer\n"
        "def broken(self, batch): raise RuntimeError('unforeseen')\n"
        "trainer.Trainer._loss = broken\n"
        "trainer.Trainer(config.load('configs/tiny.py', sys.argv[2:]), Path(sys.argv[1])).run()\n"
    )
    given = command(tiny_model, tmp_path / "run", "data.workers=2")
    options = [given[2], *given[5:]]
    done = run_python("-c", script, tmp_path / "run", *options, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and "RuntimeError: unforeseen" in done.stderr


def test_an_error_is_told_without_waiting_for_the_other_processes(tiny_model, tmp_path, monkeypatch):
    trainer, waited = build(tiny_model, tmp_path / "run", "train.steps=1"), []
    monkeypatch.setattr(AcceleratorState, "destroy_process_group", lambda *_: waited.append(True))
    with monkeypatch.context() as broken, pytest.raises(MemoryError):
        broken.setattr(Trainer, "_train_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        trainer.run()
    assert not waited
    assert trainer.run() == 0 and waited


@pytest.mark.processes
def test_a_sigterm_to_one_of_two_processes_saves_and_ends_both(tiny_model, tmp_path):
    endless = command(tiny_model, tmp_path / "run", "train.steps=100000", "train.checkpoint_every=100000")
    streams = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    process = start_python(*torchrun(2), *endless, cwd=ROOT, env=ON_CPU, start_new_session=True, **streams)
    wait_until(lambda: len(metrics(tmp_path / "run")) >= 2, process)
    _, second = sorted(psutil.Process(process.pid).children(), key=lambda child: child.create_time())
    second.send_signal(signal.SIGTERM)  # not to the one that writes
    assert process.wait(timeout=120) != 0
    last = metrics(tmp_path / "run")[-1]["step"]
    assert [saved.name for saved in training_state.list_checkpoints(tmp_path / "run")] == [f"step-{last:08d}"]
    assert f"SIGTERM: saved at step {last}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("levels", [1, 2])
def test_samples_are_counted_once_however_many_noise_levels_they_have(tiny_model, tmp_path, monkeypatch, levels):
    clock = itertools.count()  # a look is a second; a line takes two, for its work and for itself
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    build(tiny_model, tmp_path / "run", "train.steps=2", f"train.noise_levels={levels}", "train.batch_size=3").run()
    assert [line["samples_per_second"] for line in metrics(tmp_path / "run")] == [1.5, 1.5]


def test_the_compiled_encoder_of_the_vae_trains_alike(tiny_model, tmp_path, caplog):
    """Its warm-up takes one width of the context, which the VAE does not see."""
    caplog.set_level(logging.INFO, "mige")
    with torch.compiler.set_stance("force_eager"):  # what is compiled, without the compiler's minutes
        for name, parts in (("plain", "[]"), ("compiled", "['vae']")):
            trainer = build(tiny_model, tmp_path / name, "train.steps=2", f"train.compile={parts}")
            assert (trainer.vae.encoder._compiled_call_impl is not None) == (name == "compiled")
            trainer.run()
    warm = [line.split(":")[1].strip() for line in caplog.messages if "graphs compiled" in line]
    assert warm == ["width 128", "width 128 without images"]
    assert losses(tmp_path / "compiled") == losses(tmp_path / "plain")


@pytest.mark.parametrize("key", ["train.snr_gamma=0.01", "train.snr_power=0.5"])
def test_weights_by_noise_change_the_gradient_and_not_the_reported_loss(tiny_model, tmp_path, key):
    lines = []
    for name, more in (("plain", ()), ("weighted", (key,))):
        build(tiny_model, tmp_path / name, "train.steps=1", "train.batch_size=8", *more).run()
        lines += metrics(tmp_path / name)
    plain, weighted = lines
    assert plain["loss"] == weighted["loss"]
    assert abs(plain["grad_norm"] / weighted["grad_norm"] - 1) > 0.01


def test_accumulation_equals_a_larger_batch(tiny_model, tmp_path):
    build(tiny_model, tmp_path / "a", "train.steps=3", "train.batch_size=4").run()
    build(
        tiny_model, tmp_path / "b", "train.steps=3", "train.batch_size=2", "train.gradient_accumulation_steps=2"
    ).run()
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )


@pytest.mark.processes
def test_a_checkpoint_is_a_model(tiny_model, uninterrupted):
    """What infer.py loads from a checkpoint is what was trained."""
    checkpoint = uninterrupted / "checkpoints" / "step-00000009"
    pipeline = MIGEPipeline.from_pretrained(checkpoint / "model")
    for name, tensor in pipeline.model.state_dict().items():
        assert torch.equal(tensor, weights(checkpoint).get(name, tensor)), name
    before = MIGEPipeline.from_pretrained(tiny_model).model.state_dict()
    after = pipeline.model.state_dict()
    assert not torch.equal(before["transformer.proj_out.weight"], after["transformer.proj_out.weight"])
    # the vision tower is frozen, but for its last norm
    tower = "encoder.image_encoder."
    assert torch.equal(
        before[tower + "encoder.layers.0.mlp.fc1.weight"], after[tower + "encoder.layers.0.mlp.fc1.weight"]
    )
    assert not torch.equal(before[tower + "post_layernorm.weight"], after[tower + "post_layernorm.weight"])


@pytest.mark.parametrize(
    "mode, trained", [("full", {"qformer", "fusion", "text_encoder"}), ("text_encoder_frozen", {"qformer", "fusion"})]
)
def test_what_trains(tiny_model, tmp_path, mode, trained):
    trainer = build(tiny_model, tmp_path, f"train.trainable={mode}")
    names = {name for name, p in trainer.plain.named_parameters() if p.requires_grad}
    parts = {name.split(".")[1] for name in names if name.startswith("encoder.")}
    assert parts == trained | {"image_encoder"}
    assert {n for n in names if "image_encoder" in n} == {
        f"encoder.image_encoder.post_layernorm.{kind}" for kind in ("weight", "bias")
    }


def test_lora(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path / "run", "train.trainable=lora", "train.lora_rank=2", "train.steps=3")
    assert all("lora_" in n for n, p in trainer.plain.named_parameters() if p.requires_grad)
    trainer.run()
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert not (folder / "model").exists()
    merged = merge_lora(MIGEPipeline.from_pretrained(tiny_model).transformer, folder / "lora")
    inputs = dict(
        hidden_states=torch.randn(1, 8, 16, 16),
        encoder_hidden_states=torch.randn(1, 5, 40),
        timestep=torch.tensor([7.0]),
        return_dict=False,
    )
    with torch.no_grad():
        live, plain = trainer.plain.transformer(**inputs)[0], merged(**inputs)[0]
        start = MIGEPipeline.from_pretrained(tiny_model).transformer(**inputs)[0]
    assert (live - plain).norm() < 1e-5 * plain.norm() < (live - start).norm()
    with pytest.raises(CheckpointError, match="expected adapter_model"):
        merge_lora(merged, tmp_path)


def test_averaged_weights(tiny_model, tmp_path):
    """The exported model is the average; a hand computation over the steps' weights gives the same."""
    key = "transformer.proj_out.bias"
    trainer = build(tiny_model, tmp_path / "run", "train.steps=3", "train.ema=0.5")
    average = MIGEPipeline.from_pretrained(tiny_model).model.state_dict()[key].clone()
    step, seen = trainer._train_step, []

    def spy(batches):
        step(batches)
        seen.append(trainer.plain.state_dict()[key].clone())

    trainer._train_step = spy
    trainer.run()
    for number, value in enumerate(seen, start=1):
        decay = trainer.ema.get_decay(number)
        average = decay * average + (1 - decay) * value
    exported = MIGEPipeline.from_pretrained(tmp_path / "run" / "checkpoints" / "step-00000003" / "model")
    assert torch.allclose(exported.model.state_dict()[key], average, atol=1e-7)
    assert torch.equal(trainer.plain.state_dict()[key], seen[-1])  # training goes on with the raw weights


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path / "run", "train.steps=6", "train.checkpoint_every=1")
    step = trainer._train_step

    def poison(batches):
        if trainer.step == 2:
            trainer.plain.transformer.proj_out.bias.data.fill_(float("nan"))
        step(batches)

    trainer._train_step = poison
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is not finite; records: .*train.jsonl, record \d+.*step-00000002"
    ):
        trainer.run()
    good = weights(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert all(tensor.isfinite().all() for tensor in good.values())


@pytest.mark.processes
def test_disk_full_while_saving(tiny_model, tmp_path):
    run = tmp_path / "run"
    build(tiny_model, run, "train.steps=1").run()
    done = run_python(*command(tiny_model, run, "train.steps=2"), cwd=ROOT, file_size=400_000)
    assert done.returncode == 1
    assert "error: cannot save the checkpoint of step 2" in done.stderr and "step-00000001" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]


def test_bad_records_are_refused_or_logged(tiny_model, tmp_path, caplog):
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()]
    rows[1]["image"], rows[2]["entity_path"] = "images/nothing.jpg", ["images/other.jpg"]
    rows[3].pop("image")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = f"data.sets=[dict(file={str(bad)!r}, weight=1.0)]".replace("dict(file=", "{'file': ").replace(
        ", weight=1.0)", f", 'weight': 1.0, 'root': {str(TRAIN.parent)!r}}}"
    )
    with pytest.raises(BadRecordsError) as refused:
        build(tiny_model, tmp_path / "run", sets)
    assert all(row["id"] in str(refused.value) for row in rows[1:4])
    trainer = build(tiny_model, tmp_path / "run", sets, "data.skip_bad=True")
    assert len(trainer.dataset) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.transformer.num_layers=3", r"model.transformer.num_layers is 3, but .* has 2: make them equal"),
        ("model.fusion.eps=1e-5", r"model.fusion.eps is 1e-05, but .* has 1e-06: make them equal"),
    ],
)
def test_a_config_of_another_model_than_the_start_is_refused(tiny_model, tmp_path, change, said):
    with pytest.raises(config.ConfigError, match=said):
        build(tiny_model, tmp_path / "run", change)


def test_sampling_while_training(tiny_model, tmp_path):
    files = [str(ROOT / "example_data" / "subject.json"), str(ROOT / "example_data" / "edit.json")]
    build(
        tiny_model, tmp_path / "run", "train.steps=2", "train.sample_every=2", f"train.sample_records={files}",
        "train.sample_steps=2",
    ).run()  # fmt: skip
    folder = tmp_path / "run" / "samples" / "step-00000002"
    assert len(list((folder / "images").glob("*.png"))) == 5 and (folder / "contact_sheet.png").is_file()


def test_the_learning_rate():
    sizes = config.load(ROOT / "configs" / "mige_512.py").train
    assert learning_rate(sizes, 999, 64) == pytest.approx(5e-6)  # 1e-5 x sqrt(64 / 256)
    assert learning_rate(sizes, 499, 256) == pytest.approx(5e-6)  # half of the warm-up
    assert learning_rate(sizes, 10**6, 256) == pytest.approx(1e-5)


def test_the_way_back_to_inference(tiny_model, tmp_path):
    """infer.py takes a checkpoint's model/ by --model and its lora/ by --lora."""
    build(tiny_model, tmp_path / "full", "train.steps=1", "train.checkpoint_every=1").run()
    build(tiny_model, tmp_path / "lora", "train.trainable=lora", "train.steps=1", "train.checkpoint_every=1").run()
    checkpoint = "checkpoints/step-00000001"
    for name, flags in {
        "of_full": ["--model", tmp_path / "full" / checkpoint / "model"],
        "of_lora": ["--model", tiny_model, "--lora", tmp_path / "lora" / checkpoint / "lora"],
    }.items():
        records = ROOT / "example_data" / "edit.json"
        more = ["--records", records, "--steps", 2, "--output", tmp_path / name]
        done = run_here("infer_scripts/infer.py", *flags, *more)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / name / "images").glob("*.png"))) == 3

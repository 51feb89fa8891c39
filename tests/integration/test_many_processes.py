"""Runs shared by several processes on the CPU: nothing done twice, nothing lost, also after a death."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, environment
from evaluation_files import save
from golden import golden_state
from PIL import Image
from processes import ServedProcess, run_python, start_program, start_python
from safetensors.torch import load_file
from test_trainer import build, metrics, weights
from test_trainer import command as train_command
from transformers import AutoTokenizer

from mige import config
from mige.checkpoints.key_map import load_official
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.training.errors import TrainingError

pytestmark = pytest.mark.processes
RECORDS = 7


def launch(processes: int, *arguments: object, settings: dict | None = None, forked: bool = True) -> subprocess.Popen:
    """A script in so many processes, as torchrun starts them; `settings`: more environment variables."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes, *arguments]
    variables = {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    options = dict(cwd=ROOT, env=environment() | variables | (settings or {}), stdout=-1, stderr=-1)
    if forked:
        return start_python(*command, **options)
    return start_program(sys.executable, *command, **options)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out


# ---- inference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(lively) -> Path:
    return lively


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Seven records of all tasks."""
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for n in range(RECORDS):
        save(folder / f"{n}.png", n, (64, 64))
        row = {"id": f"r{n}", "multi_prompt": "a<imagehere>in the snow", "entity_path": [f"{n}.png"]}
        rows.append(row | ({"source_path": [f"{n}.png"]} if n % 3 == 0 else {}))
    (folder / "records.json").write_text(json.dumps(rows))
    return folder / "records.json"


def arguments(model: Path, records: Path, out: Path, steps: int) -> list[object]:
    # One at a time: then no image depends, even in its last bit, on who else is computed beside it.
    return ["infer_scripts/infer.py", "--model", model, "--records", records, "--output", out, "--steps", steps,
            "--batch-size", 1, "--device", "cpu"]  # fmt: skip


def images(out: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.asarray(Image.open(path)) for path in sorted((out / "images").glob("*.png"))}


@pytest.fixture(scope="module")
def alone(model, records, tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("alone") / "out"
    run_python(*arguments(model, records, out, 3), cwd=ROOT).check_returncode()
    return images(out)


def check_whole(out: Path, alone: dict[str, np.ndarray]) -> None:
    """Every record once, with the image that one process makes; no part is left over."""
    ids = Counter(json.loads(line)["id"] for line in (out / "results.jsonl").read_text().splitlines())
    assert ids == {f"r{n}": 1 for n in range(RECORDS)}
    made = images(out)
    assert made.keys() == alone.keys() and all(np.array_equal(made[one], alone[one]) for one in made)
    assert not list(out.glob("results-*.jsonl")) and (out / "index.html").is_file()


def test_three_processes_share_a_run(model, records, alone, tmp_path):
    printed = finish(launch(3, *arguments(model, records, tmp_path / "out", 3)))
    assert printed.count("7 images: open") == 1
    check_whole(tmp_path / "out", alone)


def test_a_process_dies_and_two_new_ones_resume(model, records, alone, tmp_path):
    out = tmp_path / "out"
    process = launch(2, *arguments(model, records, out, 3), forked=False)  # the launcher's own ways of ending them
    lines = lambda: [line for part in out.glob("results-*.jsonl") for line in part.read_text().splitlines()]  # noqa: E731
    deadline = time.monotonic() + 300
    while not lines():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.suspend()  # or the others are done before torchrun has noticed the death
    workers[-1].kill()
    while not all(terminating(worker.pid) for worker in workers[:-1]):  # torchrun has noticed: SIGTERM waits for them
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1][-3000:]
        time.sleep(0.05)
    for worker in workers[:-1]:
        worker.resume()
    assert process.wait(timeout=120) != 0
    before = {json.loads(line)["id"] for line in lines() if line.endswith("}")}
    assert 1 <= len(before) < RECORDS
    torn = next(iter(sorted(out.glob("results-*.jsonl"))))
    torn.write_text(torn.read_text() + '{"id": "r')  # as a kill within a write leaves it
    kept = {one: (out / "images" / f"{one}.png").stat().st_mtime_ns for one in before}
    finish(launch(2, *arguments(model, records, out, 3)))
    check_whole(out, alone)
    assert kept == {one: (out / "images" / f"{one}.png").stat().st_mtime_ns for one in before}  # none made again


def terminating(pid: int) -> bool:
    """Whether SIGTERM has been sent to a process that has not got it yet, being suspended."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


# ---- training --------------------------------------------------------------------------------------------------------

# A large eps makes AdamW linear in the gradient; a small one turns the rounding of zero gradients into full steps.
STEPS = ("train.steps=4", "train.checkpoint_every=2", "train.eps=1e-2", "train.keep_checkpoints=3")


def train(tiny_model: Path, run: Path, processes: int, batch: int, *more: str) -> dict[str, torch.Tensor]:
    """The DiT after a run's four steps."""
    script, config, *rest = train_command(tiny_model, run, *STEPS, f"train.batch_size={batch}", *more)
    finish(launch(processes, ROOT / script, ROOT / config, *rest))
    prefix, trained = "transformer.", weights(last(run))
    return {key.removeprefix(prefix): value for key, value in trained.items() if key.startswith(prefix)}


def last(run: Path) -> Path:
    return run / "checkpoints" / "step-00000004"


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """How far two results lie apart, as a share of how far training has gone."""
    assert one.keys() == other.keys() == start.keys()
    apart = sum((one[key] - other[key]).square().sum() for key in start)
    gone = sum((one[key] - start[key]).square().sum() for key in start)
    assert gone > 0
    return float((apart / gone).sqrt())


def test_four_processes_equal_one_and_resume_as_two_and_as_one(tiny_model, tmp_path):
    start = load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")
    one = train(tiny_model, tmp_path / "one", 1, 4)
    four = train(tiny_model, tmp_path / "four", 4, 1)
    assert distance(one, four, start) < 1e-3
    key = "transformer_blocks.0.attn1.to_q.weight"
    moved = (one[key] - start[key]).norm()
    assert moved > 0
    whole, shared = weights(last(tmp_path / "one")), weights(last(tmp_path / "four"))
    for name in whole:  # of the encoder too: far closer to one another than either has come from the start
        assert (whole[name] - shared[name]).norm() <= 1e-3 * moved + 1e-6 * whole[name].norm(), name
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "four"), strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    checkpoints = tmp_path / "two" / "checkpoints"
    shutil.copytree(tmp_path / "four" / "checkpoints" / "step-00000002", checkpoints / "step-00000002")
    two = train(tiny_model, tmp_path / "two", 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert distance(one, two, start) < 1e-3
    # and in one process, but not where a step would take other samples
    more = ("train.steps=5", *STEPS[1:])
    assert build(tiny_model, tmp_path / "four", *more, "train.batch_size=4").run() == 0
    with pytest.raises(TrainingError, match=r"global_batch_size: 4 there, 8 now"):
        build(tiny_model, tmp_path / "four", *more, "train.batch_size=8").run()


WORDS_ALONE = ("data.sets=[]", "data.world={'text_to_image': 1.0, 'one_reference': 1.0}")


def test_a_process_whose_batch_has_no_image_trains_along(tiny_model, tmp_path):
    """DDP waits for a gradient of every parameter from every process, also from one whose samples are words alone."""
    cases = [len(build(tiny_model, tmp_path / "look", *WORDS_ALONE).dataset.case(n).references) for n in range(8)]
    assert {(0, 1), (1, 0)} <= set(zip(cases[::2], cases[1::2], strict=True))
    one = train(tiny_model, tmp_path / "one", 1, 2, *WORDS_ALONE)
    two = train(tiny_model, tmp_path / "two", 2, 1, *WORDS_ALONE)
    assert distance(one, two, load_file(tiny_model / "transformer" / "diffusion_pytorch_model.safetensors")) < 1e-3
    for a, b in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    whole, shared = weights(last(tmp_path / "one")), weights(last(tmp_path / "two"))
    for name in (name for name in whole if name.startswith(("encoder.qformer", "encoder.fusion"))):
        assert (whole[name] - shared[name]).norm() <= 1e-3 * whole[name].norm() + 1e-6, name


def fsdp_settings() -> dict[str, str]:
    """configs/accelerate/fsdp2.yaml as `accelerate launch` hands it to the processes."""
    there = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    names = {key: key.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS") for key in there}
    return {"ACCELERATE_USE_FSDP": "true"} | {names[key]: str(value) for key, value in there.items()}


def shard(tiny_model: Path, run: Path, processes: int, batch: int, *more: str) -> ServedProcess:
    _, config, *rest = train_command(tiny_model, run, *STEPS, f"train.batch_size={batch}", *more)
    return launch(processes, ROOT / "tests" / "fsdp_on_cpu.py", ROOT / config, *rest, settings=fsdp_settings())


def exported(model: Path) -> dict[str, torch.Tensor]:
    """All trained parts of a model folder."""
    parts = ("transformer", "fusion", "qformer", "text_encoder")
    files = [file for part in parts for file in sorted((model / part).glob("*.safetensors"))]
    return {f"{file.parent.name}.{key}": value for file in files for key, value in load_file(file).items()}


# FSDP2 prepares every operation for every tensor in each process, which takes seconds: few of them.
FEW = ("model.transformer.num_layers=1", "model.qformer.num_hidden_layers=2", "model.text_encoder.num_layers=2",
       "model.image_encoder.num_hidden_layers=1")  # fmt: skip


@pytest.fixture(scope="module")
def few_tensors(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint of these sizes, in which every part does something."""
    parts = build_parts(config.load(ROOT / "configs" / "tiny.py", FEW).model)
    load_official(parts, golden_state(parts))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    folder = tmp_path_factory.mktemp("few") / "model"
    MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M()).save_pretrained(folder)
    return folder


def test_sharded_processes_equal_one_and_resume_as_four(few_tensors, tmp_path):
    """FSDP2, with averaged weights, which are what a checkpoint's model holds, samples and held-out losses on the way.

    The loss is of the averages: nothing of them is left for the step that follows.
    """
    more = (*FEW, "train.ema=0.9", "train.held_out=['example_data/train.jsonl']", "train.sample_every=4",
            "train.sample_steps=2", "train.sample_records=['example_data/edit.json']")  # fmt: skip
    assert build(few_tensors, tmp_path / "one", *STEPS, "train.batch_size=4", *more).run() == 0
    finish(shard(few_tensors, tmp_path / "two", 2, 2, *more))
    checkpoints = tmp_path / "four" / "checkpoints"
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-00000002", checkpoints / "step-00000002")
    finish(shard(few_tensors, tmp_path / "four", 4, 1, *more))
    shutil.copytree(checkpoints / "step-00000002", tmp_path / "back" / "checkpoints" / "step-00000002")
    assert build(few_tensors, tmp_path / "back", *STEPS, "train.batch_size=4", *more[:-3]).run() == 0  # which holds all
    one, two, four, back = (exported(tmp_path / run / "checkpoints" / "step-00000004" / "model")
                            for run in ("one", "two", "four", "back"))  # fmt: skip
    start = exported(few_tensors)
    assert distance(one, two, start) < 1e-3 and distance(one, four, start) < 1e-3 and distance(one, back, start) < 1e-3
    first, *others = (images(tmp_path / run / "samples" / "step-00000004") for run in ("one", "two", "four"))
    assert len(first) == 3
    for sample in others:
        assert sample.keys() == first.keys()
        assert all(np.abs(sample[name] - first[name].astype(int)).max() <= 1 for name in first)


def test_shards_in_bfloat16_equal_one_process(few_tensors, tmp_path):
    """Rounded at random alike; gradients are summed in another order, of which bfloat16 keeps 8 bits."""
    more = (*FEW, "train.precision=bfloat16", "train.learning_rate=1e-2", "train.max_grad_norm=1")
    assert build(few_tensors, tmp_path / "one", *STEPS, "train.batch_size=4", *more).run() == 0
    finish(shard(few_tensors, tmp_path / "two", 2, 2, *more))
    one, two = (exported(tmp_path / run / "checkpoints" / "step-00000004" / "model") for run in ("one", "two"))
    assert distance(one, two, exported(few_tensors)) < 0.1
    assert {value.dtype for value in two.values()} == {value.dtype for value in one.values()}


def test_fsdp2_in_bfloat16_keeps_timesteps_and_reduces_in_float32(tiny_model, tmp_path):
    """The config's timestep_dtype is float32: 999 stays 999. A mean of two bfloat16 numbers is often none itself."""
    more = ("train.steps=1", "train.checkpoint_every=1", "train.batch_size=3", "train.precision=mixed")
    _, config, *rest = train_command(tiny_model, tmp_path / "run", *STEPS, *more)
    probe = {"PROBE": str(tmp_path / "seen"), "ACCELERATE_MIXED_PRECISION": "bf16"} | fsdp_settings()
    finish(launch(2, ROOT / "tests" / "fsdp_precision.py", ROOT / config, *rest, settings=probe))
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    dataset = build(tiny_model, tmp_path / "look", *more).dataset
    times = [float(dataset[index].times[0]) for index in range(6)]
    assert any(float(torch.tensor(time).bfloat16()) != time for time in times)
    assert seen[0]["timesteps"] + seen[1]["timesteps"] == times
    for one in seen:
        assert len(one["beyond_bfloat16"]) > 20 and np.median(one["beyond_bfloat16"]) > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [("train.trainable=lora", "its few weights are not sharded"), ("train.optimizer=muon", "FSDP2 shards 'adamw'")],
)
def test_what_cannot_be_sharded_is_refused(tiny_model, tmp_path, change, said):
    process = shard(tiny_model, tmp_path / "run", 1, 4, change)
    assert said in process.communicate(timeout=200)[1] and process.returncode != 0
    assert not (tmp_path / "run").exists()


# ---- DeepSpeed (extra "deepspeed") -----------------------------------------------------------------------------------


def zero2(tiny_model: Path, run: Path, processes: int, batch: int, *more: str) -> subprocess.CompletedProcess:
    """As accelerate_config.yaml launches it, but for bfloat16."""
    pytest.importorskip("deepspeed")
    _, config, *rest = train_command(tiny_model, run, *STEPS, f"train.batch_size={batch}", *more)
    start = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "accelerate_config.yaml"]
    start += ["--num_processes", str(processes), "--mixed_precision", "no", "tests/zero2_on_cpu.py", config]
    variables = {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return run_python(*start, *rest, cwd=ROOT, env=environment() | variables)


def test_zero2_equals_one_process(tiny_model, tmp_path):
    """With the config's clipping, its accumulation and averaged weights, none of which DeepSpeed takes by itself."""
    more = ("train.max_grad_norm=0.01", "train.ema=0.9", "train.gradient_accumulation_steps=2")
    done = zero2(tiny_model, tmp_path / "two", 2, 1, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    train(tiny_model, tmp_path / "one", 1, 4, *more[:2])
    one, two = (exported(tmp_path / run / "checkpoints" / "step-00000004" / "model") for run in ("one", "two"))
    assert distance(one, two, exported(tiny_model)) < 1e-3
    again = tmp_path / "again" / "checkpoints"
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-00000002", again / "step-00000002")
    other = zero2(tiny_model, tmp_path / "again", 1, 2, *more)
    assert other.returncode != 0 and "cannot be resumed as this run is set: processes: 2 there, 1 now" in other.stderr
    done = zero2(tiny_model, tmp_path / "again", 2, 1, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(two, exported(again / "step-00000004" / "model"), exported(tiny_model)) < 1e-3


def test_zero2_refuses_an_optimiser_it_would_split_wrongly(tiny_model, tmp_path):
    done = zero2(tiny_model, tmp_path / "run", 1, 4, "train.optimizer=muon")
    assert done.returncode != 0 and "ZeRO-2 shards 'adamw'" in done.stderr

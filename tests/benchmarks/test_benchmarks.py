"""The benchmarks of speed: every one runs on the tiny model; their clocks, the table, what they refuse."""

import argparse
import copy
import importlib
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, run_here
from diffusers import AutoencoderKL
from processes import start_python

sys.path.append(str(ROOT / "benchmarks"))  # as Python finds a script's neighbours

from harness import Machine, PhaseClock, Report, table

BENCHMARKS = sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))
TINY = ["--config", ROOT / "configs" / "tiny.py"]


def start(name: str, *arguments: object) -> subprocess.CompletedProcess:
    with torch.compiler.set_stance("force_eager"):  # what is compiled, without the compiler's minutes
        return run_here(f"benchmarks/{name}", *arguments)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the harness -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that every later look at the host's clock gives, to be filled in."""
    times: list[float] = []
    monkeypatch.setattr("harness.time.perf_counter", lambda: times.pop(0))
    return times


def test_medians_leave_out_the_warm_up_and_outliers(clock):
    calls = []
    clock += [0, 5, 10, 11, 20, 22]  # three timed calls of 5, 1 and 2 s
    assert Machine("cpu").median_seconds(lambda: calls.append(1), repeats=3, warm_up=2) == 2
    assert len(calls) == 5
    clock += [0, 0.004, 1, 1.002, 2, 2.003]
    assert Machine("cpu").median_ms(lambda: None, rounds=3, warm_up=0) == pytest.approx(3)


def test_a_step_is_split_by_phase(clock):
    phases = PhaseClock(Machine("cpu"))
    clock += [0, 1, 3, 10, 12, 20, 30, 37, 40]
    for _ in range(3):
        for mark in ("start", "forward", "backward"):
            phases.mark(mark)
    found = phases.medians()  # forward 1, 2, 7; backward 2, 8, 3; steps 0 to 10, 10 to 30, 30 to 40
    assert found == {"seconds": 10, "host_ms": {"forward": 2000, "backward": 3000}}


def test_a_case_that_fails_says_so_and_the_next_one_runs(tmp_path, capsys):
    report = Report(Machine("cpu"), tmp_path / "lines.jsonl", dtype="float32")
    report.attempt({"case": "a"}, lambda: 1 / 0)
    report.attempt({"case": "b"}, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    report.attempt({"case": "c"}, lambda: {"ms": 3})
    report.skip({"case": "d"}, "time limit")
    machine, *lines = read(tmp_path / "lines.jsonl")
    assert capsys.readouterr().out == (tmp_path / "lines.jsonl").read_text()
    assert (
        machine["device"] == "cpu" and torch.__version__.startswith(machine["torch"]) and machine["dtype"] == "float32"
    )
    assert lines == [{"case": "a", "failed": "ZeroDivisionError: division by zero"},
                     {"case": "b", "failed": "out of memory"}, {"case": "c", "ms": 3},
                     {"case": "d", "skipped": "time limit"}]  # fmt: skip
    assert report.lines == [{"case": "c", "ms": 3}]


def test_the_table_shows_what_there_is():
    lines = [{"case": "a", "ms": 3, "more": 1}, {"case": "b", "ms": None}]
    assert table(lines, ("case", "ms")) == "| case | ms |\n| --- | --- |\n| a | 3 |\n| b | - |"


# ---- every benchmark -------------------------------------------------------------------------------------------------

SMALL = {
    "bench_compile.py": [*TINY, "--batch", 2, "--lengths", 12, 20, "--steps", 2],
    "bench_distill.py": [*TINY, "--time-limit", 9999, "--batch", 2, "--tokens", 20, "--steps", 1, "--cases",
                         "whole/eager", "lora/eager"],
    "bench_extraction.py": [*TINY, "--images", 3, "--batch", 2, "--workers", 0],
    "bench_few_step.py": ["--tiny", "--time-limit", 9999, "--batches", 2, 1, "--repeats", 1],
    "bench_records.py": ["--folder", "FOLDER", "--records", 300, "--simulated", 600, "--reads", 50, "--workers", 0],
    "bench_features.py": ["--images", 4, "--entries", 1000, "--folder", "FOLDER"],
    "bench_sizes.py": ["--tiny", "--long-sides", 0, 64, "--steps", 1, "--repeats", 1],
    "bench_training.py": [*TINY, "--tokens", 20, "--batches", 2, "--steps", 2, "--variants",
                          "full/eager/fused", "text_encoder_frozen/eager/stochastic", "lora/eager/fused/none"],
    "bench_vae.py": [*TINY, "--size", 32, "--batch", 1, "--repeats", 1, "--variants", "plain", "fused norms"],
    "bench_world.py": ["--images", 2, "--repeats", 1, "--worlds", "first"],
}  # fmt: skip
ELSEWHERE = {
    "bench_inference.py": "test_cases_of_the_speed_benchmark_may_have_their_own_steps",
    "bench_kernels.py": "test_kernels_need_a_gpu",
    "bench_precision.py": "test_kinds_of_adamw_are_compared_by_the_bounds",
    "bench_scaling.py": "test_scaling_measures_the_trainer_itself",
    "bench_scoring.py": "test_scoring_runs_on_small_networks",
    "bench_shapes.py": "test_shapes_take_turns_with_squares",
    "bench_small_cards.py": "test_small_cards_are_compared_with_float32",
}


def test_none_is_left_out():
    assert [*sorted(SMALL | ELSEWHERE)] == BENCHMARKS and all(name in globals() for name in ELSEWHERE.values())


STARTING = ("bench_extraction.py", "bench_records.py")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.processes if name in STARTING else ()) for name in SMALL]
)
def test_it_runs_on_a_cpu(name, tmp_path, monkeypatch):
    module = importlib.import_module(name.removesuffix(".py"))
    if name == "bench_features.py":
        monkeypatch.setattr(module, "SIZE", 64)  # of the images
    if name == "bench_records.py":
        monkeypatch.setattr(module, "BATCH", 200)
        monkeypatch.setenv("HF_DATASETS_CACHE", "")  # it sets both, which must not outlive the test
        monkeypatch.setattr(module.datasets.config, "HF_DATASETS_CACHE", "")
    arguments = [tmp_path / "folder" if word == "FOLDER" else word for word in SMALL[name]]
    words = [name, *arguments, "--device", "cpu", "--output", tmp_path / "lines.jsonl"]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with torch.compiler.set_stance("force_eager"):
        module.main()
    machine, *lines = read(tmp_path / "lines.jsonl")
    assert machine["device"] == "cpu" and lines
    assert not any("failed" in line for line in lines), lines
    rates = [number for line in lines for key, number in line.items() if "_per_s" in key or "_a_second" in key]
    assert all(rate > 0 for rate in rates) and (
        rates or name in ("bench_compile.py", "bench_features.py", "bench_records.py")
    )


@pytest.mark.processes
def test_small_cards_are_compared_with_float32(tmp_path):
    """Each mode in a process of its own; the one without a float32 to compare with is refused."""
    case = [*TINY, "--device", "cpu", "--steps", 2, "--folder", tmp_path, "--output", tmp_path / "lines.jsonl"]
    done = start("bench_small_cards.py", *case, "--modes", "t5-4", "float32", "offload")
    assert done.returncode == 0, done.stderr
    machine, exact, four_bits, offloaded = read(tmp_path / "lines.jsonl")
    assert machine["device"] == "cpu" and [exact["mode"], four_bits["mode"]] == ["float32", "t5-4"]
    assert exact["error"] == 0 < offloaded["error"] < four_bits["error"] < 1  # bfloat16's, and that of the bits
    assert done.stdout.count("| t5-4 |") == 1 and not list(tmp_path.glob("mige-small-cards-*"))
    assert start("bench_small_cards.py", *case, "--modes", "t5-4").returncode == 2


def test_kernels_need_a_gpu():
    done = start("bench_kernels.py", "--device", "cpu")
    assert done.returncode == 2 and "a GPU's" in done.stderr


@pytest.mark.processes
def test_scaling_measures_the_trainer_itself(tmp_path, monkeypatch):
    """What it starts is started as our own fork; the table is made of the lines that it has written."""
    module = importlib.import_module("bench_scaling")

    def start(command, *, cwd, env, stdout, stderr):
        own = {name: value for name, value in env.items() if name != "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}  # torchrun's
        return start_python(*command[1:], cwd=cwd, env=own, stdout=stdout, stderr=stderr)

    monkeypatch.setattr(module.subprocess, "Popen", start)
    words = ["bench_scaling.py", tmp_path, *TINY, "--cpu", "--processes", 1, "--modes", "one", "--tokens", 20,
             "--steps", 5, "--batch", 2, "--warm-up", 1, "--profile", "one", "--saving", "one"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    module.main()
    lines = read(tmp_path / "results.jsonl")
    assert [line.get("steps") for line in lines] == [1, 2, 5, 5, 5, None], (tmp_path / "one.log").read_text()
    assert len(lines[4]["stalls"]) == 2 and min(lines[4]["checkpoint_seconds"]) > 0
    profiled = (tmp_path / "one.profile").read_text()
    assert all(f" x {phase}\n" in profiled for phase in ("transformer", "optimizer 0", "backward", "clipping"))
    assert not (tmp_path / "runs" / "one").exists()
    (row,) = module.rows(tmp_path)
    assert row["complete"] and row["exit_code"] == 0 and row["tokens"] == 20
    assert row["a_card"] == pytest.approx(2 / row["seconds"], rel=0.01) and row["recompiles"] == 0


def test_shapes_take_turns_with_squares(tmp_path, monkeypatch, capsys):
    """Two turns of each, of two steps; the shapes of all micro-batches."""
    module, seen = importlib.import_module("bench_shapes"), []
    for name in ("load_pretrained", "load_dataset", "frozen_digest"):  # which it puts others in the place of
        monkeypatch.setattr(module.trainer, name, getattr(module.trainer, name))
    monkeypatch.setenv("MIGE_BENCH", "")
    monkeypatch.delitem(sys.modules, "training_worker", raising=False)
    step = module.Trainer._loss
    noted = lambda self, batch: (seen.append(tuple(batch.noise_BCHW.shape[2:])), step(self, batch))[1]  # noqa: E731
    monkeypatch.setattr(module.Trainer, "_loss", noted)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = tmp_path / "shapes.py"
    config.write_text(f"_base_ = {str(ROOT / 'configs' / 'tiny.py')!r}\ndata = dict(shapes=[[8, 8], [7, 9]])\n")
    words = ["bench_shapes.py", tmp_path / "run", "--config", config, "--batch", 2, "--steps", 2, "--warm-up", 1,
             "--tokens", 40, "--precision", "float32", "--workers", 0]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    with torch.compiler.set_stance("force_eager"):
        module.main()
    *turns, last = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [line["turn"] for line in turns] == list(module.TURNS) and last["recompiles"] == 0
    assert last["ratio"] == pytest.approx(last["shapes"] / last["squares"], abs=1e-3)
    square, wide = (16, 16), (14, 18)
    assert seen[-9:] == [square, square, square, square, wide, square, square, square, wide]


@pytest.mark.processes
def test_scoring_runs_on_small_networks(tmp_path, monkeypatch):
    import bench_scoring

    monkeypatch.setattr(bench_scoring, "VISION", {"ViT-B/32": (32, 1, 2, 32, 16)})
    monkeypatch.setattr(bench_scoring, "random_dino", lambda device: bench_scoring.random_clip("ViT-B/32", device))
    monkeypatch.setattr(sys, "argv", ["bench_scoring.py", "--images", "2", "--batch", "1", "--device", "cpu",
                                      "--backbones", "CLIP ViT-B/32", "DINO ViT-S/16",
                                      "--output", str(tmp_path / "lines.jsonl")])  # fmt: skip
    bench_scoring.main()
    _, *lines = read(tmp_path / "lines.jsonl")
    assert [line["backbone"] for line in lines][2:] == ["CLIP ViT-B/32 and CLIP ViT-B/32"] and len(lines) == 3
    assert all(line[f"{of}_per_s"] > 0 for line in lines for of in ("from_files", "opened", "network"))


# ---- inference -------------------------------------------------------------------------------------------------------


def test_cases_of_the_speed_benchmark_may_have_their_own_steps(tmp_path):
    path, cases = (
        tmp_path / "inference.jsonl",
        [
            "edit/1/plain+t5-8",
            "edit/1/plain@2",
            "edit/1/plain",
            "dit/1/plain",
            "subject/2/naive",
            "edit/1/compiled+vae16+reuse2",
        ],
    )
    settings = ["--tiny", "--device", "cpu", "--repeats", 1, "--steps", 3, "--output", path]
    done = start("bench_inference.py", *settings, "--cases", *cases)
    assert done.returncode == 0, done.stderr
    device, *lines = read(path)
    assert device["device"] == "cpu" and not [line for line in lines if "failed" in line]
    assert [(line["case"], line.get("steps")) for line in lines] == [
        ("edit/1/plain", 2),
        ("edit/1/plain", 3),
        ("dit/1/plain", None),
        ("subject/2/naive", 3),
        ("edit/1/compiled+vae16+reuse2", 3),
        ("edit/1/plain+t5-8", 3),  # rebuilds the pipeline: last
    ]
    assert ["latent_error" in line for line in lines] == [False, False, False, False, True, True]
    assert "| edit/1/plain | 2 |" in done.stdout


@pytest.mark.parametrize("case", ["edit/1", "edit/1/plain@", "edit/1/plain@0", "dit/1/plain@2", "edit/0/plain"])
def test_an_unknown_case_is_refused(case):
    read = runpy.run_path(str(ROOT / "benchmarks" / "bench_inference.py"))["Case"].read
    assert str(read("edit/25/compiled+vae16@20")) == "edit/25/compiled+vae16@20"
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(case))):
        read(case)


def test_the_fused_norms_of_the_vae_are_its_norms():
    fuse_norms = runpy.run_path(str(ROOT / "benchmarks" / "bench_vae.py"))["fuse_norms"]
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, layers_per_block=1, **blocks).eval()
    with torch.no_grad():
        for weight in vae.parameters():  # weights and shifts of every channel its own
            weight += 0.1 * torch.randn_like(weight)
        vae.encoder.conv_in.bias += 30  # a mean far from zero, from which a sum of squares would cancel
        fused, x = copy.deepcopy(vae), torch.randn(2, 3, 16, 16)
        fuse_norms(fused)
        with torch.compiler.set_stance("force_eager"):
            got, want = (one.encode(x).latent_dist.mean for one in (fused, vae))
            assert (got - want).norm() < 1e-4 * want.norm()
            got, want = (one.decode(want).sample for one in (fused, vae))
            assert (got - want).norm() < 1e-4 * want.norm()


WARM = """12:00 I warm-up: width 256: 20.1 s forward, 19.0 s backward, 6 graphs compiled
12:00 I warm-up: width 192: compiling
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("torch.OutOfMemoryError: no room\nFatal Python error: Aborted\n", "torch.OutOfMemoryError: no room"),
        ("Fatal Python error: Aborted\n", "Fatal Python error: Aborted"),
        ("1 step\n", "before the warm-up after 150 s"),
        (
            WARM,
            r"in warm-up \(width 256: 20.1 s forward, 19.0 s backward, 6 graphs compiled; width 192: compiling\) .* s",
        ),
        (WARM + "12:00 I warm-up: done in 60 s\n1 step\n", "in training after 150 s"),
    ],
)
def test_a_run_that_failed_says_why(log, said, tmp_path):
    (tmp_path / "run.log").write_text(log)
    failure = runpy.run_path(str(ROOT / "benchmarks" / "bench_scaling.py"))["failure"]
    assert re.fullmatch(said, failure(tmp_path / "run.log", 150))


def test_modes_keep_their_order_and_share_the_cards():
    grouped = runpy.run_path(str(ROOT / "benchmarks" / "bench_scaling.py"))["in_groups"]
    names = ["one", "one_24", "lora", "default", "lora_kept", "fsdp2_float32"]
    assert grouped(names, 2) == [["one", "one_24"], ["lora"], ["default"], ["lora_kept"], ["fsdp2_float32"]]
    assert grouped(names, 1) == [["one"], ["one_24"], ["lora"], ["lora_kept"]]


def test_kinds_of_adamw_are_compared_by_the_bounds():
    module = importlib.import_module("bench_precision")
    rng, found = np.random.default_rng(0), {}
    shift = {"mixed": (0, 0, 0), "bfloat16": (0, 0.5, 0), "adamw_8bit": (-0.3, 0, 0.0001)}
    base = {name: rng.random(400) for name in module.BOUNDS}
    for kind, seed in itertools.product(module.KINDS, (0, 1)):
        noise = {name: 1e-5 * rng.standard_normal(400) for name in module.BOUNDS}
        found[kind, seed] = {name: base[name] + noise[name] + by
                             for name, by in zip(module.BOUNDS, shift[kind], strict=True)}  # fmt: skip
    lines = {(line["measure"], line["kind"]): line for line in module.compare(found, (0, 1))}
    assert {key: line["verdict"] for key, line in lines.items()} == {
        ("identity", "bfloat16"): "not worse", ("identity", "adamw_8bit"): "worse",
        ("success", "bfloat16"): "not worse", ("success", "adamw_8bit"): "not worse",
        ("l1_inside", "bfloat16"): "not worse", ("l1_inside", "adamw_8bit"): "not worse",
    }  # fmt: skip
    assert lines["success", "bfloat16"]["difference"] == pytest.approx(0.5, abs=1e-3)
    found["bfloat16", 0]["l1_inside"] += 0.2
    found["bfloat16", 1]["l1_inside"] -= 0.2  # its seeds lie far apart: nothing can be said
    last = {(line["measure"], line["kind"]): line["verdict"] for line in module.compare(found, (0, 1))}
    assert last["l1_inside", "bfloat16"] == "not resolved"

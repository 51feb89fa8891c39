"""The benchmarks of speed and deviation: measures against closed forms, whole runs on the tiny model, the figure."""

import argparse
import copy
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_here
from diffusers import AutoencoderKL
from PIL import Image

from mige.data.synthetic.cases import make_cases
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench
from mige.utils import images

SETTINGS = ["compiled/6", "compiled/3", "compiled+reuse2/6", "compiled+vae16/6",
            "compiled+bfloat16/6"]  # fmt: skip
KINDS = ("two_references", "add", "add_by_reference")  # one of each task


def start(name: str, *arguments: object) -> subprocess.CompletedProcess:
    with torch.compiler.set_stance("force_eager"):  # what is compiled, without the compiler's minutes
        return run_here(f"benchmarks/{name}", *arguments)


@pytest.fixture(scope="module")
def functions() -> dict:
    with pytest.MonkeyPatch.context() as patch:  # as Python finds a script's neighbours
        patch.syspath_prepend(ROOT / "benchmarks")
        return runpy.run_path(str(ROOT / "benchmarks" / "bench_deviation.py"))


@pytest.fixture(scope="module")
def model(lively) -> Path:
    return lively


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """The lines of a run on a CPU."""
    path = tmp_path_factory.mktemp("run") / "deviation.jsonl"
    choice = ["--device", "cpu", "--per-kind", 2, "--batch", 2, "--kinds", *KINDS]
    done = start(
        "bench_deviation.py", model, *choice, "--reference-steps", 6, "--settings", *SETTINGS, "--output", path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == path.read_text()
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_measures_are_as_worked_out_by_hand(functions):
    wanted = torch.stack([torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), -1.0)])
    made = wanted + torch.tensor([0.0, 0.2])[:, None, None, None]
    assert functions["psnrs"](made, wanted).tolist() == pytest.approx([120.0, 20.0], abs=1e-3)
    assert functions["latent_errors"](made, wanted).tolist() == pytest.approx([0.0, 0.2], abs=1e-6)
    right, half, wrong = {"success": 1.0}, {"success": 1.0, "identity": 0.0}, {"success": 0.0}
    judged = functions["judge"]([right, half, wrong, right], [right, half, right, wrong])
    assert judged == {"same_verdict": 0.5, "success": 0.75, "identity": 0.0}


def test_cases_are_given_as_the_mini_bench_gives_them(functions, model, tmp_path):
    pipeline, cases = MIGEPipeline.from_pretrained(model), make_cases(2, kinds=["add_by_reference"])
    bench.run(pipeline, cases, tmp_path, model=str(model), batch=2, steps=2, guidance=2.0)
    samples, noise = functions["inputs"](pipeline, cases)
    made = images.to_pil(pipeline.decode(pipeline.run(samples, noise, steps=2, **functions["GUIDANCE"])))
    for one, picture in zip(cases, made, strict=True):
        with Image.open(tmp_path / "images" / f"{one.id}.png") as saved:
            assert saved.tobytes() == picture.tobytes()


def test_a_run_has_a_line_a_setting_and_the_reference_differs_by_nothing(run):
    lines = read(run)
    assert [f"{line['mode']}/{line['steps']}" for line in lines] == SETTINGS
    assert not any("failed" in line for line in lines)
    reference, *others = lines
    assert reference["latent_error"] == reference["latent_error_95"] == 0
    assert reference["psnr"] == 120 and reference["same_verdict"] == 1
    reused, *others = sorted(others, key=lambda line: "reuse2" not in line["mode"])
    assert reused["mode"] == "compiled+reuse2" and reused["latent_error"] == 0  # two blocks have no middle to reuse
    for line in others:
        low, high = line["psnr_interval"]
        assert 0 < line["psnr"] < 120 and low <= line["psnr"] <= high, line
        assert all(0 <= line[name] <= 1 for name in ("same_verdict", "success", "identity", "background"))
        assert line["latent_error_95"] >= line["latent_error"] > 0, line
    for line in lines:
        assert (line["cases"], line["reference_steps"], line["device"]) == (6, 6, "cpu")
        assert (line["model"], line["torch"]) == ("model", torch.__version__)
        assert line["dtype"] == ("bfloat16" if "bfloat16" in line["mode"].split("+") else "float32")


def test_the_figure_shows_what_was_both_timed_and_compared(run, tmp_path):
    timed = [
        ("edit/25/compiled", 6),
        ("edit/25/compiled", 3),
        ("edit/25/compiled+reuse2", 6),
        ("edit/1/compiled", 3),
    ]
    lines = [{"device": "card"}] + [
        {"case": c, "steps": s, "images_a_second": 2.0 + n} for n, (c, s) in enumerate(timed)
    ]
    speeds, figure = tmp_path / "inference.jsonl", tmp_path / "speed.png"
    speeds.write_text("".join(json.dumps(line) + "\n" for line in lines) + "| case | steps |\n")
    plot = runpy.run_path(str(ROOT / "benchmarks" / "plot_speed.py"))
    joined = {(line["mode"], line["steps"]): line for line in plot["joined"](read(run), lines)}
    assert joined.keys() == {("compiled", 3), ("compiled+reuse2", 6), ("compiled+bfloat16", 6)}  # no reference
    assert [line["images_a_second"] for line in joined.values()] == [3.0, 4.0, 2.0]
    assert {line["timed_on"] for line in joined.values()} == {"card"}
    done = start("plot_speed.py", run, speeds, figure)
    assert done.returncode == 0, done.stderr
    with Image.open(figure) as picture:
        assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(10**6)) > 20
    speeds.write_text("")
    assert "is in both files" in start("plot_speed.py", run, speeds, figure).stderr


@pytest.mark.parametrize("setting", ["compiled", "compiled/0", "compiled/x", "compiled+magic/6"])
def test_an_unknown_setting_is_refused(functions, setting):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(setting))):
        functions["Setting"].read(setting)


def test_cases_of_the_speed_benchmark_may_have_their_own_steps(tmp_path):
    path, cases = tmp_path / "inference.jsonl", ["edit/1/plain+t5-8", "edit/1/plain@2", "edit/1/plain", "dit/1/plain"]
    settings = ["--tiny", "--device", "cpu", "--repeats", 1, "--steps", 3, "--output", path]
    done = start("bench_inference.py", *settings, "--cases", *cases)
    assert done.returncode == 0, done.stderr
    device, *lines = read(path)
    assert device["device"] == "cpu"
    assert [(line["case"], line.get("steps")) for line in lines] == [
        ("edit/1/plain", 2),
        ("edit/1/plain", 3),
        ("dit/1/plain", None),
        ("edit/1/plain+t5-8", 3),  # rebuilds the pipeline: last
    ]
    assert ["latent_error" in line for line in lines] == [False, False, False, True]  # from that of as many steps
    assert not any("failed" in line for line in lines) and "| edit/1/plain | 2 |" in done.stdout


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


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("torch.OutOfMemoryError: no room\nFatal Python error: Aborted\n", "torch.OutOfMemoryError: no room"),
        ("Fatal Python error: Aborted\n", "Fatal Python error: Aborted"),
        ("1 step\n", "no error in run.log: too slow or stuck"),
    ],
)
def test_a_run_that_failed_says_why(log, said, tmp_path):
    (tmp_path / "run.log").write_text(log)
    failure = runpy.run_path(str(ROOT / "benchmarks" / "bench_scaling.py"))["failure"]
    assert re.fullmatch(said, failure(tmp_path / "run.log"))

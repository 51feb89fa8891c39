"""The few-step adapters that ship, on the model that ships, through infer.py."""

import json

import numpy as np
from conftest import ROOT, run_here
from PIL import Image

MODEL = ROOT / "output" / "pretrained_models" / "mige-mini"
IMAGES = ROOT / "docs" / "images"  # of README: what MIGE-mini makes of the same prompt in 20 steps of two branches
SOURCE, SUBJECT, TEACHERS = (IMAGES / f"subject_edit{name}.png" for name in ("-1", "-2", ""))


def infer(output, *more):
    prompt = "exchange the thing in the middle in<imagehere>for<imagehere>"
    options = ["--lora", MODEL.with_name("mige-mini-turbo"), "--prompt", prompt, "--source", SOURCE]
    return run_here("infer_scripts/infer.py", "--model", MODEL, *options, "--reference", SOURCE, SUBJECT,
                    "--output", output, *more)  # fmt: skip


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_four_steps_of_one_branch_draw_what_the_teacher_draws(tmp_path):
    result = infer(tmp_path / "out")
    assert result.returncode == 0, result.stderr
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert (row["steps"], row["guidance"]) == (4, 1.0)
    image = pixels(tmp_path / "out" / "images" / "image.png")
    to_teacher, to_source = (abs(image - pixels(path)).mean() for path in (TEACHERS, SOURCE))
    assert to_teacher < 4 < 8 < to_source  # of 255: the subject is another one, the rest is the source


def test_guidance_that_is_inside_already_is_refused(tmp_path):
    result = infer(tmp_path / "out", "--guidance", "2")
    assert result.returncode != 0 and "guidance" in result.stderr and not (tmp_path / "out" / "images").exists()

"""The demo: a teacher and its few-step student beside each other, each in its own steps."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from mige.checkpoints.lora import add_lora, save_lora
from mige.cli import demo as cli_demo
from mige.cli.places import MINI_STUDENT
from mige.diffusion.few_step import FewStepSolver
from mige.inference.pipeline import MIGEPipeline
from mige.mini import demo
from mige.utils import images


@pytest.fixture
def student(lively, tmp_path):
    pipe = MIGEPipeline.from_pretrained(lively)
    pipe.scheduler = FewStepSolver(num_inference_steps=1)
    pipe.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def test_teacher_and_student_beside_each_other(lively, student, tmp_path, monkeypatch):
    one = demo.chosen(3)[:1]
    monkeypatch.setattr(demo, "chosen", lambda seed: one)
    out = tmp_path / "demo"
    given = ["--model", lively, "--student", student, "--output", out, "--seed", 3, "--steps", 2, "--dtype", "float32"]
    assert not cli_demo.main([str(one) for one in given])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [one[0].id, f"{one[0].id}-student"]
    assert [row["seconds"].rpartition(", ")[0] for row in rows] == ["2 steps", "student, 1 step"]
    assert sorted(path.stem for path in (out / "images").iterdir()) == sorted(row["id"] for row in rows)
    page = (out / "index.html").read_text()
    assert all(f"images/{row['id']}.png" in page for row in rows) and (out / "contact_sheet.png").is_file()


def test_adapters_are_a_student_of_the_model(lively, tmp_path, monkeypatch):
    """Those that ship are taken by themselves, beside the model that ships alone."""
    assert Path(cli_demo.parse([]).student).name == "mige-mini-turbo" and MINI_STUDENT.is_dir()
    assert cli_demo.parse(["--model", str(lively)]).student is None
    pipe = MIGEPipeline.from_pretrained(lively)
    add_lora(pipe.transformer, 2)
    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(pipe.transformer, tmp_path / "lora")
    FewStepSolver(num_inference_steps=2).save_config(tmp_path / "lora")
    one = demo.chosen(3)[:1]
    monkeypatch.setattr(demo, "chosen", lambda seed: one)
    out = tmp_path / "demo"
    given = ["--model", lively, "--student", tmp_path / "lora", "--output", out, "--steps", 2, "--dtype", "float32"]
    assert not cli_demo.main([str(one) for one in given])
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["seconds"].rpartition(", ")[0] for row in rows] == ["2 steps", "student, 2 steps"]
    teacher, student = (images.open_image(out / "images" / f"{row['id']}.png") for row in rows)
    assert teacher != student
    pipe = MIGEPipeline.from_pretrained(lively)
    pipe.load_lora_weights(tmp_path / "lora")
    references = [images.open_image(path) for path in sorted((out / "inputs").iterdir())]
    source = None if one[0].case.source is None else references[one[0].case.source]
    assert pipe(one[0].case.prompt, references, source, seed=one[0].seed).images[0] == student


def test_a_model_without_student_stands_alone(lively, tmp_path, monkeypatch):
    one = demo.chosen(3)[:1]
    monkeypatch.setattr(demo, "chosen", lambda seed: one)
    assert not cli_demo.main(["--model", str(lively), "--output", str(tmp_path / "demo"), "--steps", "1"])
    assert len((tmp_path / "demo" / "results.jsonl").read_text().splitlines()) == 1


def test_with_bfloat16_weights_the_vae_is_in_bfloat16_too(lively):
    given = argparse.Namespace(model=str(lively), student=None)
    [fast], [plain] = demo.load(given, torch.bfloat16), demo.load(given, torch.float32)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    got, want = fast.decode(latents), plain.decode(latents)
    assert fast.vae.dtype is torch.bfloat16 and plain.vae.dtype is torch.float32
    assert 0 < (got - want).norm() < 0.03 * want.norm()

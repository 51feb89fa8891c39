"""The demo: a teacher and its few-step student beside each other, each in its own steps."""

import json

import pytest

from mige.cli import demo as cli_demo
from mige.diffusion.few_step import FewStepSolver
from mige.inference.pipeline import MIGEPipeline
from mige.mini import demo


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


def test_a_model_without_student_stands_alone(lively, tmp_path, monkeypatch):
    one = demo.chosen(3)[:1]
    monkeypatch.setattr(demo, "chosen", lambda seed: one)
    assert not cli_demo.main(["--model", str(lively), "--output", str(tmp_path / "demo"), "--steps", "1"])
    assert len((tmp_path / "demo" / "results.jsonl").read_text().splitlines()) == 1

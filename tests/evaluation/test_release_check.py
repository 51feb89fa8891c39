"""Scores beside the paper's rows: verdicts by hand, the report to paste, the shell script on tiny sets."""

import json
from pathlib import Path

import evaluation_files as files
import pytest
import yaml
from conftest import ROOT, run_here, shell_environment
from processes import run_program

from mige.evaluation import release_check
from mige.evaluation.published import PUBLISHED


def report(folder: Path, run: str, *entries: tuple[str, str, float, int, int]) -> None:
    """A report.json of entries (version, measure, mean, n, of)."""
    table = [
        {"version": version, "subset": "all", "measure": measure, "mean": mean, "low": mean - 0.01,
         "high": mean + 0.01, "n": n, "of": of}
        for version, measure, mean, n, of in entries
    ]  # fmt: skip
    table += [entry | {"subset": "turn 1", "mean": 0.5, "of": None} for entry in table]
    path = folder / run / "evaluation" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"label": "mige", "protocol": {}, "table": table}))


def test_figures_are_compared_with_the_papers(tmp_path):
    report(tmp_path, "dreambench", ("model", "DINO", 0.7535, 750, 750), ("model", "CLIP-I", 0.8, 750, 750))
    report(tmp_path, "emu_edit", ("model", "CLIPim", 0.8735, 3589, 3589), ("copy", "CLIPim", 1.0, 3589, 3589))
    local = "CLIP-T (local captions)"
    report(tmp_path, "magicbrush", ("model", "L1", 0.0590, 1053, 1053), ("target", local, 0.28264, 1053, 1053))
    report(tmp_path, "magicbrush_iterative", ("model", "L1", 0.2, 535, 535), ("target", local, 0.2826, 535, 535))
    report(tmp_path, "migebench", ("model", "DINO", 0.9, 3, 1000))
    found = {(one.run, one.row, one.measure): one.verdict for one in release_check.lines(tmp_path)}
    assert found == {
        ("dreambench", "model", "DINO"): "as expected",
        ("dreambench", "model", "CLIP-I"): "nothing to compare with",
        ("emu_edit", "model", "CLIPim"): "differs",
        ("magicbrush", "model", "L1"): "as expected",
        ("magicbrush", "the true image", local): "as expected",
        ("magicbrush_iterative", "model", "L1"): "nothing to compare with",
        ("magicbrush_iterative", "the true image", local): "differs",  # the final turn's is .2855
        ("migebench", "model", "DINO"): "nothing to compare with",
    }
    done = run_here("tools/verify_release.py", "scores", tmp_path)
    assert done.returncode == 3 and "0.2855 ± 0.0005" in done.stdout
    assert "3,589 samples, CLIP not stated" in (tmp_path / "report.md").read_text()


def test_a_part_of_a_benchmark_says_nothing(tmp_path):
    report(tmp_path, "emu_edit", ("model", "CLIPim", 0.5, 6, 3589))
    assert [one.verdict for one in release_check.lines(tmp_path)] == ["part of the set"]
    assert run_here("tools/verify_release.py", "scores", tmp_path).returncode == 0
    said = (tmp_path / "report.md").read_text()
    assert "Not run: dreambench, magicbrush, magicbrush_iterative, migebench.\n" in said


def test_every_row_of_the_paper_is_compared():
    """No row of MIGE in the published table is left out for want of a run."""
    assert {one.benchmark for one in PUBLISHED if one.method == "MIGE"} <= set(release_check.RUNS)


def test_a_folder_without_reports_is_refused(tmp_path):
    done = run_here("tools/verify_release.py", "scores", tmp_path)
    assert done.returncode == 1 and "run tools/verify_release.sh with their data" in done.stderr


def test_the_form_asks_for_what_the_script_leaves():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "released_weights.yml").read_text())
    labels = {part["attributes"].get("label"): part for part in form["body"]}
    assert labels["report.md"]["validations"]["required"] and "verify_release.sh" in form["description"]
    assert len({part["id"] for part in form["body"] if "id" in part}) == len(form["body"]) - 1


@pytest.mark.processes
@pytest.mark.slow
def test_the_script_from_weights_to_the_report(tmp_path, tiny_model):
    """On the tiny model and sets: an unknown model and parts of benchmarks end with a report, and with 3."""
    out = tmp_path / "verified"
    env = shell_environment() | {
        "MAGICBRUSH": str(files.magicbrush(tmp_path / "magicbrush", local=True)),
        "EMU_EDIT": str(files.emu_edit(tmp_path / "emu")),
        "CLIP_WEIGHTS": str(files.clip(tmp_path / "clip")),
        "DINO_WEIGHTS": str(files.dino(tmp_path / "dino.safetensors")),
    }
    done = run_program("sh", ROOT / "tools" / "verify_release.sh", tiny_model, out, env=env)
    assert done.returncode == 3, done.stderr
    text = (out / "report.md").read_text()
    assert "no known model has these keys" in text and '"DiT\'s estimate"' in text
    for row in (
        "| emu_edit | model | CLIPim |",
        "| magicbrush | model | L1 |",
        "| magicbrush_iterative | the true image |",
    ):
        (line,) = [one for one in text.splitlines() if one.startswith(row)]
        assert "part of the set" in line
    protocol = json.loads((out / "emu_edit" / "evaluation" / "report.json").read_text())["protocol"]
    assert protocol["outputs"].startswith("through JPEG")
    (out / "emu_edit" / "evaluation" / "report.json").write_text("{")
    done = run_program("sh", ROOT / "tools" / "verify_release.sh", tmp_path / "nowhere", out, env=env)
    assert done.returncode == 1 and "no such folder" in done.stderr

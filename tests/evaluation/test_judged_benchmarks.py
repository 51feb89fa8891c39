"""The four judged benchmarks: rows from their layouts, and the whole way from the shell script to the report."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluation_files
import judged_files
import numpy as np
import pytest
from conftest import ROOT, run_here, shell_environment
from evaluation_files import image, save
from judge_server import says, serve, text_of
from PIL import Image
from processes import run_program
from test_local_judge import save_judge

from mige.data.checks import check_images
from mige.data.parsing import read_records
from mige.evaluation.benchmarks.files import BenchmarkError, Options
from mige.evaluation.benchmarks.judged_rows import context_prompt, subject_prompt
from mige.evaluation.benchmarks.prepared import prepare, read
from mige.evaluation.benchmarks.table import BENCHMARKS
from mige.evaluation.judges import local, views
from mige.evaluation.judges.published import PUBLISHED
from mige.evaluation.judges.rubrics import EDIT, rubric
from mige.utils.files import folder_lock

JUDGED = {"gedit": 3, "imgedit": 3, "dreambench_plus": 27, "omnicontext": 3}


@pytest.fixture
def rows(tmp_path):
    """prepare(NAME), then its rows."""

    def made(name: str, **options) -> list[dict]:
        data = getattr(judged_files, name)(tmp_path / "data")
        prepare(name, Options(str(data), **options), tmp_path / "out")
        return list(read(tmp_path / "out").rows)

    return made


@pytest.mark.parametrize("name", JUDGED)
def test_rows_are_records(rows, tmp_path, name):
    assert len(rows(name)) == JUDGED[name]
    report = read_records([tmp_path / "out" / "records.jsonl"])
    assert not check_images(report.records) and not report.issues and len(report.records) == JUDGED[name]


def test_gedit_takes_the_english_rows(rows):
    first, second, _ = rows("gedit")
    assert first["id"] == f"background_change-{0:032x}" and second["score"]["group"] == "subject-add"
    assert first["task"] == "edit" and first["multi_prompt"] == "make the sky number 0"
    assert [row["score"]["also"] for row in (first, second)] == [[], ["intersection"]]
    assert np.array_equal(np.asarray(Image.open(first["source_path"][0])), np.asarray(image(0, (48, 32))))


def test_imgedit_finds_its_originals(rows):
    found = {row["id"]: row for row in rows("imgedit")}
    assert found.keys() == {"1082", "673", "628"} and found["628"]["score"]["group"] == "replace"
    assert found["628"]["source_path"][0].endswith("Benchmark/singleturn/daily object/000276684.jpg")


def test_dreambench_plus_marks_its_subjects(rows):
    found = rows("dreambench_plus")
    assert found[0]["id"] == "animal_00_kitten-0" and found[9]["id"] == "object_00_toy_car-0"
    assert found[0]["multi_prompt"] == "a<imagehere>with thing 0"
    assert (
        found[9]["multi_prompt"] == "a<imagehere>with thing 0"
        and found[9]["score"]["caption"] == "a Toy Car with thing 0"
    )
    assert found[18]["multi_prompt"] == "<imagehere>a scene with thing 0"
    kinds = [row["score"]["also"] for row in found[:9]]
    assert kinds == [["photorealistic"]] * 4 + [["style transfer"]] * 3 + [["imaginative"]] * 2
    assert {row["score"]["cluster"] for row in found} == {"live_subject/animal/00", "object/00", "style/00"}


def test_subject_prompts_are_of_whole_words():
    assert subject_prompt("A cat sees a category of cat.", "Cat") == "A<imagehere>sees a category of cat."
    assert subject_prompt("a category", "cat") == "<imagehere>a category"


@pytest.mark.parametrize(
    ("text", "images", "prompt", "order"),
    [
        ("Draw it.", 1, "<imagehere>Draw it.", [1]),
        ("The man of image 2 and image 1.", 2, "The man of<imagehere>and<imagehere>.", [2, 1]),
        ("Let the first image be in the second picture, as image 1.", 2,
         "Let<imagehere>be in<imagehere>, as image 1.", [1, 2]),
        ("The dog from Image #3 alone.", 3, "<imagehere><imagehere>The dog from<imagehere>alone.", [1, 2, 3]),
        ("image 7", 1, "<imagehere>image 7", [1]),
    ],
)  # fmt: skip
def test_numbered_images_become_markers(text, images, prompt, order):
    assert context_prompt(text, images) == (prompt, order)


def test_omnicontext_shows_the_judge_its_images_by_number(rows, tmp_path):
    _, both, scene = rows("omnicontext")
    assert both["multi_prompt"] == "The man from<imagehere>hugs the woman from<imagehere>."
    assert [Path(path).stem[-1] for path in both["entity_path"]] == ["2", "1"]
    image(9).save(tmp_path / "out.png")
    shown = views.show("omnicontext", both, tmp_path / "out.png")
    assert [name for name, _ in shown] == ["reference image 1", "reference image 2", "the generated image"]
    assert np.array_equal(np.asarray(shown[0][1]), np.asarray(judged_image(10)))
    assert rubric("omnicontext", scene["score"]).questions[1].prompt == "identity_scene"


def judged_image(seed: int) -> Image.Image:
    return image(seed, (48, 32))


def test_sizes_that_a_judge_is_shown(rows, tmp_path):
    """GEdit-Bench: the result at its source's size; DreamBench++: 512 x 512; else down to 1024 x 1024 px of area."""
    made = tmp_path / "made.png"
    image(0, (2048, 1040)).save(made)
    row = rows("gedit")[0]
    assert [one.size for _, one in views.show("gedit", row, made)] == [(48, 32)] * 2
    assert views.show("imgedit", row, made)[1][1].size == (1424, 720)
    subject = {"entity_path": row["entity_path"], "source_path": [], "task": "subject", "score": {}}
    assert [one.size for _, one in views.show("dreambench_plus", subject, made)] == [(512, 512)] * 2
    shown = views.for_question(views.show("imgedit", row, made), EDIT.questions[0], swapped=True)
    assert [name for name, _ in shown] == ["the edited image", "the source image"]


def test_an_instruction_names_its_images_in_words():
    row = {"multi_prompt": "replace the cup in<imagehere>with the<imagehere>.", "entity_path": ["s", "e"]}
    row |= {"source_path": ["s"], "score": {}}
    assert views.instruction(row) == "replace the cup in the source image with the reference image."
    assert views.instruction(row | {"source_path": [], "score": {"caption": "a cup"}}) == "a cup"


# ---- files that are not whole ----------------------------------------------------------------------------------------


def test_damaged_files_name_what_is_wrong(tmp_path):
    data = judged_files.imgedit(tmp_path / "data")
    edits = json.loads((data / "basic_edit.json").read_text())

    def refused(match: str, **fields):
        (data / "basic_edit.json").write_text(json.dumps(edits | {"628": {**edits["628"], **fields}}))
        with pytest.raises(BenchmarkError, match=match):
            prepare("imgedit", Options(str(data)), tmp_path / "out")

    refused("628: the edit_type is paint, expected add", edit_type="paint")
    refused("628: the prompt is '', expected a text", prompt="")
    refused("628: no file .*/animal/none.jpg", id="animal/none.jpg")
    refused("628: the id is ../../secret.png, expected a path below", id="../../secret.png")
    refused("628: the id is /etc/hosts", id="/etc/hosts")
    with pytest.raises(BenchmarkError, match=r"0 files basic_edit.json in it, expected one"):
        prepare("imgedit", Options(str(data / "Benchmark")), tmp_path / "other")


def test_a_damaged_dreambench_plus(tmp_path):
    data = judged_files.dreambench_plus(tmp_path / "data")
    (data / "captions" / "object" / "00.txt").write_text("Toy Car\none prompt\n")
    with pytest.raises(BenchmarkError, match=r"object/00: 1 prompts, expected 9"):
        prepare("dreambench_plus", Options(str(data)), tmp_path / "out")
    (data / "images" / "live_subject" / "animal" / "00.jpg").rename(tmp_path / "00.jpg")
    with pytest.raises(BenchmarkError, match=r"live_subject/animal/00: no file"):
        prepare("dreambench_plus", Options(str(data)), tmp_path / "out")
    with pytest.raises(BenchmarkError, match=r"no captions/\*\*/\*.txt"):
        prepare("dreambench_plus", Options(str(data / "images")), tmp_path / "other")


def test_published_rows_use_known_names():
    measures = {"gedit": {"SC", "PQ", "O"}, "imgedit": {"score"}, "omnicontext": {"PF", "SC", "O"}}
    for one in PUBLISHED:
        assert one.scores.keys() <= measures[one.benchmark] and one.benchmark in BENCHMARKS, one


# ---- the whole way ---------------------------------------------------------------------------------------------------


def verdict(payload: dict, _: int):
    """Scores of as many numbers as are asked for, inside the scale; the third question of a kind is refused."""
    low, high = map(int, re.search(r"from (\d+) to (\d+)", text_of(payload)).groups())
    count = len(re.search(r'"score": \[(.*)\]', text_of(payload))[1].split(","))
    if "number 2" in text_of(payload):
        return says("I'm sorry, I can't help with that.")
    return says(json.dumps({"reasoning": "as asked", "score": [high, *[low + 1] * (count - 1)]}))


@pytest.mark.processes
@pytest.mark.parametrize("name", JUDGED)
def test_from_the_script_to_the_report(tmp_path, tiny_model, name, monkeypatch):
    """The script of the benchmark with the tiny model, tools/judge.py with the scripted server, all files."""
    data, out = getattr(judged_files, name)(tmp_path / "data"), tmp_path / "results"
    if name == "dreambench_plus":
        for folder in ("object", "style"):
            (data / "captions" / folder / "00.txt").unlink()
    script = ROOT / "infer_scripts" / f"{name}.sh"
    done = run_program("sh", script, data, tiny_model, out, env=shell_environment())
    assert done.returncode == 0, done.stderr
    assert f"next: python tools/judge.py --benchmark {name} --results {out}" in done.stdout
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-2")
    with serve(verdict) as server:
        command = ["tools/judge.py", "--benchmark", name, "--results", out, "--judge", "scripted", "--label", "mine"]
        command += ["--endpoint", server.url, "--key-env", "JUDGE_KEY", "--swap", "--repeats", 2]
        first = run_here(*command)
        asked = len(server.requests)
        again = run_here(*command)
    assert first.returncode == 0, first.stderr
    assert again.stdout == first.stdout and len(server.requests) == asked > 0
    report = json.loads((out / "judged" / "report.json").read_text())
    assert report["label"] == "mine" and report["protocol"]["judge"] == "scripted"
    written = [path for path in (out / "judged").iterdir() if path.suffix in (".json", ".jsonl", ".html")]
    assert len(written) == 4 and "sk-secret-2" not in "".join(path.read_text() for path in written)
    expected = {
        "gedit": {"SC": 1, "PQ": 1, "O": 1},
        "imgedit": {"score": 3},
        "dreambench_plus": {"CP": 1, "PF": 1, "CP x PF": 1},
        "omnicontext": {"PF": 10, "SC": 10, "O": 10},
    }[name]
    means = {entry["measure"]: entry["mean"] for entry in report["table"] if entry["subset"] == "all"}
    assert means == pytest.approx(expected)
    assert bool(report["errors"]) == (name == "gedit")
    page = (out / "judged" / "report.html").read_text()
    for text in ("as asked", "Krippendorff", "not comparable with published numbers", "Best by"):
        assert text in page, text
    assert ("published, by other judges" in page) == (name != "dreambench_plus")
    for link in {part.split('"')[0] for part in page.split('src="')[1:]}:
        assert (out / "judged" / link).is_file(), link
    if name == "gedit":
        assert "2 of 606 *" in first.stdout and "unreadable: refused" in page and "Answers that gave no score" in page


def results(prepared: Path, run: Path, first: int) -> None:
    """An image for every record of a prepared folder."""
    for n, row in enumerate(read(prepared).rows):
        save(run / "images" / f"{row['id']}.png", first + n, (32, 32))


def test_a_judge_on_this_machine_through_the_command(tmp_path, monkeypatch):
    """A random model says nothing that can be read: every answer is an error, none is a score, the page says so."""
    monkeypatch.setattr(local, "MAX_TOKENS", 8)
    prepare("gedit", Options(str(judged_files.gedit(tmp_path / "data"))), tmp_path / "run" / "benchmark")
    results(tmp_path / "run" / "benchmark", tmp_path / "run", 10)
    command = ["tools/judge.py", "--benchmark", "gedit", "--results", tmp_path / "run", "--device", "cpu"]
    command += ["--judge", save_judge(tmp_path / "judge")]
    done = run_here(*command)
    assert done.returncode == 0 and "6 of 6 answers gave no score; 3 records have none at all" in done.stdout, (
        done.stderr
    )
    report = json.loads((tmp_path / "run" / "judged" / "report.json").read_text())
    assert report["table"] == [] and len(report["errors"]) == 6
    assert report["protocol"]["precision"] == "bfloat16" and len(report["protocol"]["judge's weights"]) == 16
    assert "Answers that gave no score" in (tmp_path / "run" / "judged" / "report.html").read_text()
    with ThreadPoolExecutor(1) as pool:  # a lock is its thread's own
        lock = folder_lock(tmp_path / "run" / "judged")
        pool.submit(lock.__enter__).result()
        done = run_here(*command)
        pool.submit(lock.__exit__, None, None, None).result()
    assert done.returncode == 1 and "another run writes here" in done.stderr


@pytest.mark.parametrize("name", ["emu_edit", "magicbrush", "migebench"])
def test_the_measured_benchmarks_can_be_judged(tmp_path, name):
    """VIEScore's questions about their records: what the judge is shown and told."""
    data = getattr(evaluation_files, name)(tmp_path / "data")
    prepare(name, Options(str(data)), tmp_path / "run" / "benchmark")
    results(tmp_path / "run" / "benchmark", tmp_path / "run", 10)
    with serve(verdict) as server:
        done = run_here("tools/judge.py", "--benchmark", name, "--results", tmp_path / "run", "--judge", "j",
                        "--endpoint", server.url, "--key-env", "none", "--workers", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = text_of(server.requests[0])
    told = {
        "emu_edit": ['"make the sky number 0"', "Image A: the source image.\nImage B: the edited image."],
        "magicbrush": ['"do 0"', "Image A: the source image.\nImage B: the edited image."],
        "migebench": [
            '"add the reference image to the source image"',
            "Image A: the reference image.\nImage B: the source",
        ],
    }[name]
    assert all(part in text for part in told), text


def test_two_judged_runs_are_compared(tmp_path):
    """By compare_runs.py, case by case, of one server's protocol; a case without a score in one is left out."""
    data, high = judged_files.gedit(tmp_path / "data"), {"first": 4, "second": 9}

    def script(payload: dict, n: int):
        score = high[now]
        return verdict(payload, n) if "number 2" in text_of(payload) else says(f'{{"score": [{score}, {score}]}}')

    with serve(script) as server:
        for now in high:
            prepare("gedit", Options(str(data)), tmp_path / now / "benchmark")
            results(tmp_path / now / "benchmark", tmp_path / now, 10 * high[now])
            done = run_here("tools/judge.py", "--benchmark", "gedit", "--results", tmp_path / now, "--judge", "j",
                            "--endpoint", server.url, "--key-env", "none")  # fmt: skip
            assert done.returncode == 0, done.stderr
    both = [tmp_path / name / "judged" for name in high]
    done = run_here("tools/compare_runs.py", *both, "--output", tmp_path / "compared")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    (semantics,) = [one for one in found["table"] if (one["measure"], one["kind"]) == ("SC", "every kind")]
    assert (semantics["n"], semantics["difference"], semantics["wins"]) == (2, 5, 1)
    assert (tmp_path / "compared" / "report.html").is_file()


def test_what_does_not_go_together_is_refused(tmp_path):
    given = ["tools/judge.py", "--results", tmp_path, "--judge", "j"]
    for more, said in {
        ("--benchmark", "gedit", "--repeats", 2): "gives the same answer each time",
        ("--benchmark", "gedit", "--repeats", 0): "--repeats, --workers",
        ("--benchmark", "gedit", "--endpoint", "http://localhost:1/v1", "--adapter", "a"): "belong to a judge on this",
        ("--benchmark", "imgedit", "--scale", 25): "has a scale of its own",
    }.items():
        done = run_here(*given, *more)
        assert done.returncode == 2 and said in done.stderr, done
    data = judged_files.gedit(tmp_path / "data")
    prepare("gedit", Options(str(data)), tmp_path / "benchmark")
    done = run_here(*given, "--benchmark", "imgedit", "--endpoint", "http://localhost:1/v1")
    assert done.returncode == 1 and "is gedit, expected imgedit" in done.stderr
    done = run_here("tools/evaluate.py", "--benchmark", "gedit", "--results", tmp_path)
    assert done.returncode == 2 and "invalid choice: 'gedit'" in done.stderr
    done = run_here("tools/prepare_benchmark.py", "imgedit", "--output", tmp_path / "o")
    assert done.returncode == 2 and "imgedit is not on the hub" in done.stderr

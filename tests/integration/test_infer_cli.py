"""infer.py as a user runs it: exit codes, messages, folders; killed, out of space, and through the shell scripts."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, shell_environment
from PIL import Image
from processes import run_python, start_program, start_python

from mige.checkpoints.errors import CheckpointError
from mige.cli import infer as cli_infer
from mige.inference.pipeline import MIGEPipeline

SCRIPT = ROOT / "infer_scripts" / "infer.py"
EXAMPLES = ROOT / "example_data"
FILES = [EXAMPLES / f"{task}.json" for task in ("subject", "edit", "subject_edit")]
CAT, COFFEE = EXAMPLES / "images" / "cat.jpg", EXAMPLES / "images" / "coffee.jpg"
IDS = {row["id"] for file in FILES for row in json.loads(file.read_text())}


@pytest.fixture(scope="module")
def model(lively):
    return lively


def infer(*arguments):
    """Run infer.py inside this process (importing takes seconds): its exit code, stdout and stderr.

    An exception that would print a traceback fails the test.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli_infer.main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # what the interpreter does with sys.exit("...")
        err.write(code)
        code = 1
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def write(path, rows):
    path.write_text(json.dumps(rows))
    return path


def made(folder):
    return sorted(path.name for path in (folder / "images").iterdir())


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def assert_same_images(got, want):
    assert made(got) == made(want)
    for name in made(got):
        a, b = (np.array(Image.open(folder / "images" / name)).astype(int) for folder in (got, want))
        assert np.abs(a - b).max() <= 1, name


@pytest.fixture
def no_weights(monkeypatch):
    """From here on, loading weights is a failure."""
    monkeypatch.setattr(MIGEPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run of all examples, one at a time. Read only."""
    folder = tmp_path_factory.mktemp("whole")
    done = infer("--model", model, "--records", *FILES, "--output", folder, "--steps", 12, "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    assert f"7 images: open {folder}/index.html" in done.stdout
    return folder


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_the_run_folder(whole):
    assert made(whole) == sorted(f"{name}.png" for name in IDS)
    assert {line["id"] for line in lines(whole)} == IDS
    for name in ("config.json", "contact_sheet.png", "index.html", "inputs"):
        assert (whole / name).exists(), name
    assert not (whole / "failures.jsonl").exists()
    assert json.loads((whole / "config.json").read_text())["settings"]["dtype"] == "float32"


def test_the_same_command_again_keeps_every_image(model, whole, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    arguments = ("--model", model, "--records", *FILES, "--output", folder, "--steps", 12)
    lost = folder / "images" / "blue_suit.png"
    lost.unlink()
    before = {name: (folder / "images" / name).stat().st_mtime_ns for name in made(folder)}
    assert infer(*arguments, "--note", "a line for the reader").returncode == 0
    assert {name: (folder / "images" / name).stat().st_mtime_ns for name in before} == before
    assert_same_images(folder, whole)
    assert "a line for the reader" in (folder / "index.html").read_text()


@pytest.mark.processes
def test_killed_and_started_again(model, whole, tmp_path):
    arguments = ("--model", model, "--records", *FILES, "--output", tmp_path, "--steps", 12, "--batch-size", 1)
    log = tmp_path / "results.jsonl"
    child = start_python(SCRIPT, *arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while child.poll() is None and time.monotonic() < deadline and not (log.exists() and b"\n" in log.read_bytes()):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 1 <= len(log.read_bytes().split(b"\n")) - 1 < 7 and not (tmp_path / "index.html").exists()
    finished = {name: (tmp_path / "images" / name).stat().st_mtime_ns for name in made(tmp_path) if name[0] != "."}
    (tmp_path / "images" / ".0123456789abcdef.part").write_bytes(b"half an image")  # killed while saving

    done = infer(*arguments)
    assert done.returncode == 0, done.stderr
    assert {line["id"] for line in lines(tmp_path)} == IDS and len(lines(tmp_path)) == 7
    first = f"{lines(tmp_path)[0]['id']}.png"
    assert (tmp_path / "images" / first).stat().st_mtime_ns == finished[first]
    assert_same_images(tmp_path, whole)  # and no half images


@pytest.mark.processes
def test_no_space_left_for_an_image(model, whole, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    arguments = ("--model", model, "--records", FILES[1], "--output", tmp_path, "--steps", 12, "--batch-size", 1)
    smallest = min(path.stat().st_size for path in (whole / "images").iterdir())
    done = run_python(SCRIPT, *arguments, file_size=smallest // 2)
    assert done.returncode == 1
    assert "error: " in done.stderr and "cannot write: " in done.stderr
    assert f"{tmp_path}/images/pagoda_in_snow.png" in done.stderr and "Traceback" not in done.stderr
    assert made(tmp_path) == [] and lines(tmp_path) == []
    assert infer(*arguments).returncode == 0
    assert made(tmp_path) == ["blue_suit.png", "pagoda_in_snow.png", "rocket_at_sunrise.png"]


@pytest.mark.processes
def test_the_shell_scripts(model, tmp_path):
    """All three at once, with the official settings; from another folder, since they find their own way."""
    options = dict(env=shell_environment(), cwd=tmp_path, stderr=subprocess.PIPE)
    running = {
        task: start_program(
            "sh", ROOT / "infer_scripts" / f"{task}.sh", model, EXAMPLES / f"{task}.json", tmp_path / task, **options
        )
        for task in ("subject", "edit", "subject_edit")
    }
    for task, child in running.items():
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        wanted = {row["id"] for row in json.loads((EXAMPLES / f"{task}.json").read_text())}
        got = lines(tmp_path / task)
        assert {line["id"] for line in got} == wanted
        assert {(line["steps"], line["guidance"]) for line in got} == {(50, 7.0) if task == "subject" else (60, 5.0)}


@pytest.mark.parametrize(
    "arguments, task",
    [
        (["--prompt", "a<imagehere>in the snow", "--reference", CAT], "subject"),
        (["--prompt", "make it night", "--source", COFFEE], "edit"),
        (["--prompt", "put<imagehere>into<imagehere>", "--reference", CAT, COFFEE, "--source", COFFEE], "subject_edit"),
    ],
)
def test_a_single_case(model, tmp_path, arguments, task):
    done = infer("--model", model, *arguments, "--output", tmp_path, "--steps", 2, "--height", 64, "--width", 96)
    assert done.returncode == 0, done.stderr
    (line,) = lines(tmp_path)
    assert (line["id"], line["task"], line["size"]) == ("image", task, [96, 64])


def test_two_cases_in_one_folder_need_two_names(model, tmp_path):
    arguments = ("--model", model, "--output", tmp_path, "--steps", 1, "--height", 64, "--width", 64, "--source", CAT)
    assert infer(*arguments, "--prompt", "make it red").returncode == 0
    before = (tmp_path / "images" / "image.png").read_bytes()
    done = infer(*arguments, "--prompt", "make it blue")
    assert done.returncode == 1 and "use another --output or another --id" in done.stderr
    assert "finished 'image' with another prompt" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = infer(*arguments, "--prompt", "make it blue", "--id", "blue")
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == ["blue.png", "image.png"] and {line["id"] for line in lines(tmp_path)} == {"image", "blue"}
    assert (tmp_path / "images" / "image.png").read_bytes() == before
    done = infer(*arguments, "--prompt", "make it blue", "--id", "../blue")
    assert done.returncode == 1 and "\"id\" is '../blue', unfit for a file name" in done.stderr


def test_parts_kept_off_the_device_until_they_compute(model, whole, tmp_path):
    done = infer("--model", model, "--records", FILES[1], "--output", tmp_path, "--steps", 12, "--offload")
    assert done.returncode == 0, done.stderr
    for name in made(tmp_path):
        got, want = (np.array(Image.open(folder / "images" / name)).astype(int) for folder in (tmp_path, whole))
        assert np.abs(got - want).max() <= 1


@pytest.mark.processes  # of the compiler
@pytest.mark.parametrize(
    "arguments, most",
    [
        (["--compile"], 1),
        (["--vae-dtype", "bfloat16"], 8),
        (["--t5-bits", 8], 8),
        (["--compile", "--offload", "--reuse", 2, "--t5-bits", 4], 255),
    ],
)
def test_the_fast_and_the_small_modes(model, whole, tmp_path, arguments, most):
    """Grey levels between a mode's images and the plain ones, at the most."""
    done = infer("--model", model, "--records", FILES[1], "--output", tmp_path, "--steps", 12, *arguments)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path)
    for name in made(tmp_path):
        got, want = (np.array(Image.open(folder / "images" / name)).astype(int) for folder in (tmp_path, whole))
        assert np.abs(got - want).max() <= most, name


# ---- bad records -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_files(tmp_path):
    """Two files with five errors and two good records."""
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:3000])
    rows = [
        {"id": "good", "multi_prompt": "a<imagehere>", "entity_path": [str(CAT)]},
        {"id": "gone", "multi_prompt": "a<imagehere>", "entity_path": ["gone.jpg"]},
        {"id": "count", "multi_prompt": "a<imagehere>and<imagehere>", "entity_path": [str(CAT)]},
    ]
    long = "a<imagehere>" + " word" * 90 + "<imagehere>"
    more = [
        json.dumps({"id": "cut", "multi_prompt": "a<imagehere>", "entity_path": ["cut.jpg"]}),
        '{"id": "comma" "multi_prompt"}',
        json.dumps({"id": "long", "multi_prompt": long, "entity_path": [str(CAT), str(COFFEE)]}),
        json.dumps({"id": "fine", "multi_prompt": "make it red", "source_path": [str(CAT)]}),
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(more))
    return [write(tmp_path / "a.json", rows), tmp_path / "b.jsonl"]


ERRORS = ["gone.jpg: no such file", "2 <imagehere> in the prompt, 1 reference", "cut.jpg: cannot be decoded",
          "b.jsonl, line 2, column 16: malformed JSON", "only 1 of 2 <imagehere>"]  # fmt: skip


def test_one_report_of_every_error_and_nothing_runs(model, bad_files, tmp_path, no_weights):
    done = infer("--model", model, "--records", *bad_files, "--output", tmp_path / "run", "--steps", 2)
    assert done.returncode == 1
    assert done.stderr.startswith("5 errors, ")
    assert all(error in done.stderr for error in ERRORS)
    assert not (tmp_path / "run").exists()


def test_keep_going(model, bad_files, tmp_path):
    run = tmp_path / "run"
    arguments = ("--model", model, "--output", run, "--steps", 2, "--keep-going", "--records")
    done = infer(*arguments, *bad_files)
    assert done.returncode == 3
    assert all(error in done.stderr for error in ERRORS) and f"listed in {run}/failures.jsonl" in done.stderr
    assert made(run) == ["fine.png", "good.png"]
    failures = [json.loads(line) for line in (run / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 5 and all(failure.keys() == {"where", "message", "hint"} for failure in failures)
    told = "\n".join("{where}: {message}".format(**failure) for failure in failures)
    assert all(error in told for error in ERRORS)

    bad_files[1].write_text(bad_files[1].read_text().splitlines()[3])  # mended
    write(bad_files[0], json.loads(bad_files[0].read_text())[:1])
    assert infer(*arguments, *bad_files).returncode == 0
    assert not (run / "failures.jsonl").exists()


def test_keep_going_with_nothing_good(model, bad_files, tmp_path, no_weights):
    write(bad_files[0], json.loads(bad_files[0].read_text())[1:])
    done = infer("--model", model, "--records", bad_files[0], "--output", tmp_path / "run", "--keep-going")
    assert done.returncode == 1 and done.stderr.startswith("2 errors") and not (tmp_path / "run").exists()


def test_a_single_case_that_is_wrong(model, tmp_path, no_weights):
    done = infer("--model", model, "--prompt", "a<imagehere>", "--reference", "no.jpg", "--output", tmp_path / "run")
    assert done.returncode == 1 and "command line (id image): no.jpg: no such file" in done.stderr


def test_the_task_that_was_insisted_on(model, tmp_path, no_weights):
    done = infer("--model", model, "--records", FILES[1], "--task", "subject", "--output", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.startswith("3 errors") and 'which makes it "edit"' in done.stderr


# ---- other mistakes --------------------------------------------------------------------------------------------------


def test_a_folder_with_other_settings_or_records(model, whole, tmp_path, no_weights):
    """Refused before the weights load."""
    common = ("--model", model, "--output", whole)
    done = infer(*common, "--records", *FILES, "--steps", 13)
    assert done.returncode == 1 and "other settings (steps: 12 there, 13 now)" in done.stderr
    row = {"id": "cat_and_cup", "multi_prompt": "another<imagehere>", "entity_path": [str(CAT)]}
    done = infer(*common, "--records", write(tmp_path / "x.json", [row]), "--steps", 12)
    assert done.returncode == 1 and "finished 'cat_and_cup' with another prompt" in done.stderr


def test_model_folders_that_are_none(model, tmp_path, no_weights):
    def run(folder):
        done = infer("--model", folder, "--records", *FILES, "--output", tmp_path / "run")
        assert done.returncode == 1 and not (tmp_path / "run").exists()
        return done.stderr

    assert f"error: {tmp_path}/nothing: no such folder; correct the path" in run(tmp_path / "nothing")
    assert f"error: {EXAMPLES}: not a checkpoint folder" in run(EXAMPLES)
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    shutil.rmtree(broken / "qformer")
    assert "qformer: missing from model_index.json or from the folder" in run(broken)


@pytest.mark.parametrize(
    "name, is_hub",
    [("someone/mige", True), ("nowhere/to/be/found", False), ("/tmp/mige", False), ("mige", False), ("./mige", False)],
)
def test_which_names_are_the_hub_s(monkeypatch, tmp_path, name, is_hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MIGEPipeline, "download", lambda name, **_: f"/cache/{name}")
    if is_hub:
        assert MIGEPipeline.locate(name) == Path("/cache") / name
    else:
        with pytest.raises(CheckpointError, match="no such folder"):
            MIGEPipeline.locate(name)
    (tmp_path / "someone").mkdir()  # now it is a mistyped path
    with pytest.raises(CheckpointError, match="someone/mige: no such folder; correct the path"):
        MIGEPipeline.locate("someone/mige")
    with pytest.raises(CheckpointError, match="did you mean someone/mige"):
        MIGEPipeline.locate("somoene/mige")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--height", "100"], "height and width must be multiples of 16 px, got 100 x 128"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(model, tmp_path, arguments, told):
    run = tmp_path / "run"
    done = infer("--model", model, "--records", FILES[0], "--output", run, *arguments)
    assert done.returncode == 1 and f"error: {told}" in done.stderr
    assert not run.exists()  # still free for a run with good ones


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "give either --records or --prompt"),
        (["--records", "x.json", "--prompt", "a cat"], "give either --records or --prompt"),
        (["--prompt", "a cat", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--prompt", "a cat", "--device", "abacus"], "--device abacus: Expected one of cpu, cuda"),
        (["--prompt", "a cat", "--task", "draw"], "invalid Task value: 'draw'"),
    ],
)
def test_arguments_that_make_no_command(arguments, told):
    done = infer("--model", "m", *arguments)
    assert done.returncode == 2 and told in done.stderr


def test_an_output_that_is_a_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    done = infer("--model", model, "--records", FILES[0], "--output", tmp_path / "file", "--steps", 2)
    assert done.returncode == 2 and f"{tmp_path}/file is a file; name a folder" in done.stderr

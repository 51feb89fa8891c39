"""How scripts end where they cannot go on: Ctrl-C, outputs that cannot be written, values that look like options."""

import errno
import importlib
import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT
from PIL import Image
from processes import start_python

from mige.checkpoints.errors import CheckpointError
from mige.cli import command, infer, places

CONFIG = str(ROOT / "configs" / "tiny.py")
ARGUMENTS = {
    "ablate": ["OUT"],
    "check_data": ["r.json"],
    "compare_runs": ["a", "b", "--output", "OUT"],
    "convert_checkpoint": ["release", "--model", "m", "--vae", "v", "--t5", "t", "--output", "OUT"],
    "demo": ["--output", "OUT"],
    "download_weights": ["--output", "OUT"],
    "draw_sprites": ["OUT"],
    "evaluate": ["--benchmark", "dreambench", "--results", "OUT"],
    "extract_entities": ["--results", "r", "--output", "OUT"],
    "extract_features": ["--records", "r.json", "--model", "m", "--output", "OUT"],
    "infer": ["--model", "m", "--prompt", "a cat", "--output", "OUT"],
    "judge": ["--benchmark", "gedit", "--results", "OUT", "--judge", "m"],
    "make_tiny_checkpoint": ["OUT"],
    "make_world": ["OUT", "--cases", "1"],
    "prepare_benchmark": ["emu_edit", "--output", "OUT"],
    "prepare_data": ["magicbrush", "--output", "OUT"],
    "pretrain_mini_encoder": ["OUT", "--start", "s"],
    "start_ablation": ["OUT"],
    "start_mini": ["OUT"],
    "verify_release": ["model", "m", "--output", "OUT"],
    "train_mige": [CONFIG, "--output", "OUT"],
    "distill": [CONFIG, "--output", "OUT"],
    "web_demo": [],
}
ANEW = {"check_data", "convert_checkpoint", "demo", "draw_sprites", "make_tiny_checkpoint", "make_world",
        "prepare_benchmark", "pretrain_mini_encoder", "start_mini"}  # fmt: skip
WRITING = sorted(
    name for name in ARGUMENTS if "OUT" in ARGUMENTS[name] and name not in ("train_mige", "distill")
)  # they have their own check


def given(name: str, output: object) -> list[str]:
    return [str(output) if argument == "OUT" else argument for argument in ARGUMENTS[name]]


def test_every_script_is_tried_here():
    assert ARGUMENTS.keys() == {path.stem for folder in ("tools", "train_scripts", "infer_scripts")
                                for path in (ROOT / folder).glob("*.py")}  # fmt: skip


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARGUMENTS)
def test_ctrl_c_is_one_line_and_130(name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"mige.cli.{name}")

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run", interrupt)
    assert module.main(given(name, tmp_path / "out")) == (0 if name == "web_demo" else 130)  # it is how the page ends
    out, err = capsys.readouterr()
    [line] = err.strip().splitlines()
    assert out == "" and line.startswith("interrupted: ") and "the same command" in line
    assert ("resumes" in line) == (name not in ANEW)


@pytest.mark.processes
def test_ctrl_c_of_a_terminal_leaves_no_traceback_of_any_worker(tmp_path):
    """A terminal signals the whole group: the workers as well."""
    Image.effect_noise((2500, 2500), 50).save(tmp_path / "large.png")
    rows = []
    for name in (f"{number}.png" for number in range(2000)):  # an image of many records is opened once
        os.link(tmp_path / "large.png", tmp_path / name)
        rows.append({"entity_path": [name], "source_path": [name], "multi_prompt": "make<imagehere>red", "image": name})
    (tmp_path / "r.json").write_text(json.dumps(rows))
    arguments = (ROOT / "tools" / "check_data.py", tmp_path / "r.json", "--workers", 2)
    with (tmp_path / "err").open("w") as err:
        process = start_python(*arguments, stdout=err, stderr=err, start_new_session=True)
    while len(psutil.Process(process.pid).children(recursive=True)) < 2:  # the workers
        assert process.poll() is None, (tmp_path / "err").read_text()
        time.sleep(0.01)
    time.sleep(1)  # they open images by then, of which there are more than a minute's
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    said = (tmp_path / "err").read_text()
    assert said.endswith("\ninterrupted: the check is not finished, the same command starts anew\n")
    assert "Traceback" not in said and "KeyboardInterrupt" not in said


def test_known_errors_are_one_line_and_unknown_ones_are_not_hidden():
    def fails(error):
        def run(args):
            raise error

        return run

    for error in (CheckpointError("m: no weights"), FileNotFoundError(errno.ENOENT, "no such file", "x.json")):
        with pytest.raises(SystemExit) as end:
            command.guarded(fails(error), None)
        assert end.value.code == f"error: {error}"
    with pytest.raises(ZeroDivisionError):
        command.guarded(fails(ZeroDivisionError()), None)


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITING)
def test_an_output_that_cannot_be_written_is_refused_before_anything_runs(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "locked").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))
    module = importlib.import_module(f"mige.cli.{name}")
    for output, said in (
        (tmp_path / "file", f"{tmp_path / 'file'} is a file; name a folder"),
        (tmp_path / "file" / "below", f"{tmp_path / 'file'} is a file; name a folder"),
        (tmp_path / "dangling", f"{tmp_path / 'dangling'} is a link to nothing ({tmp_path / 'gone'}); name a folder"),
        (tmp_path / "locked" / "run", f"{tmp_path / 'locked'} is not writable; change its permissions or name another"),
        (tmp_path / ("n" * 300), "File name too long; name another folder"),
        ("", "the path is empty; name a folder"),
    ):
        with pytest.raises(SystemExit) as end:
            module.main(given(name, output))
        assert end.value.code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "gone").exists()


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["-1 on a sign", "-5", "-remove", "--no hat", "- a list", "-s", "—"])
def test_a_prompt_may_begin_with_a_hyphen(prompt):
    assert infer.parse(["--model", "m", "--prompt", prompt, "--note", "-x", "--seed", "3"]).prompt == prompt
    assert infer.parse(["--model", "m", f"--prompt={prompt}"]).prompt == prompt


def test_a_prompt_that_is_read_as_an_option_is_answered_with_how_it_is_given(capsys):
    with pytest.raises(SystemExit) as end:
        infer.parse(["--model", "m", "--prompt", "--hat"])
    assert end.value.code == 2 and 'begins with "-" is given as --prompt="-..."' in capsys.readouterr().err
    assert infer.parse(["--model", "m", "--prompt=--hat"]).prompt == "--hat"


def test_one_file_given_twice_in_other_words(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.json").write_text("[]")
    (tmp_path / "link.json").symlink_to("r.json")
    monkeypatch.chdir(tmp_path)
    for again in ("./r.json", tmp_path / "r.json", "link.json"):
        with pytest.raises(SystemExit) as end:
            infer.parse(["--model", "m", "--records", "r.json", str(again)])
        assert end.value.code == 2 and f"--records: {tmp_path / 'r.json'} is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "quark"], "--device quark: "),
        (["--size", "-64"], "--size is -64, --batch-size 32, --workers None; expected >= 1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--workers", "-1"], "--workers -1"),
    ],
)
def test_extract_features_refuses_values_before_weights_load(arguments, said, tmp_path, capsys):
    from mige.cli import extract_features

    with pytest.raises(SystemExit) as end:
        extract_features.main([*given("extract_features", tmp_path / "store"), *arguments])
    assert end.value.code == 2 and said in capsys.readouterr().err and not (tmp_path / "store").exists()


def test_defaults_are_the_checkouts_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        elsewhere = importlib.reload(places)
        assert (elsewhere.CONFIGS / "mini.py").is_file() and elsewhere.MODELS.parent.parent == ROOT
        monkeypatch.chdir(ROOT)
        assert str(importlib.reload(places).MINI) == "output/pretrained_models/mige-mini"  # as pages show it
    finally:
        importlib.reload(places)

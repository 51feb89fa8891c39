"""A run's folder through what can happen to it: damage, two runs at once, other spellings of paths, a power failure."""

import contextlib
import io
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import start_python

from mige.data.records import Record
from mige.inference import run as inference
from mige.inference.run import RunError, Settings
from mige.tasks import Task
from mige.utils.images import to_pil

SETTINGS = Settings(model="tiny", dtype="float32", steps=2)
CAT = Path(__file__).parents[2] / "example_data" / "images" / "cat.jpg"
SIDE = 16


class Pipe:
    """Makes from a record's noise an image that no other record has; counts."""

    _execution_device = torch.device("cpu")
    scheduler = SimpleNamespace(config={})

    def __init__(self):
        self.made = 0

    def output_size(self, height, width):
        return SIDE, SIDE

    def set_progress_bar_config(self, **_):
        pass

    def maybe_free_model_hooks(self):
        pass

    def draw_noise(self, task, references, generator, height, width):
        return torch.randn(3, SIDE, SIDE, generator=generator).clamp(-1, 1)

    def run(self, samples, noise, **_):
        self.made += len(samples)
        return to_pil(torch.stack(noise))


def record(name="a", prompt="a<imagehere>", path=CAT, where="x.jsonl, record 1"):
    return Record(name, Task.SUBJECT, prompt, (path,), None, None, None, where)


RECORDS = [record(name) for name in ("a", "b", "c")]


def run(folder, records=RECORDS, how=SETTINGS):
    """How many images a run makes, and what it says on stderr."""
    pipe, err = Pipe(), io.StringIO()
    with contextlib.redirect_stderr(err):
        inference.run(records, pipe, how, folder, batch_size=2)
    return pipe.made, err.getvalue()


def pixels(folder):
    return {path.stem: np.array(Image.open(path)).tolist() for path in (folder / "images").glob("*.png")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three records. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder)[0] == 3
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


# ---- damaged lines ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
    [
        (b"", "blank"),
        (b"   ", "blank"),
        (b"[1, 2]", "JSON of type list"),
        (b'"a"', "JSON of type str"),
        (b"null", "JSON of type NoneType"),
        (b"not json", "no JSON"),
        (b"\xff\xfe\x00", "no UTF-8 text"),
        (b"[" * 3000, "nested too deep"),
        (b'{"id": "b", "image": "images/b.png"}', "its task is None"),
        (b'{"id": "../../x", "image": "images/../../x.png"}', "its id is '../../x'"),
        (b'{"id": "b", "image": "/etc/passwd"}', "its image is '/etc/passwd', expected 'images/b.png'"),
        (b'{"step": 100, "loss": 0.1}', "its id is None"),
    ],
)
def test_a_foreign_line_is_named_and_nothing_is_lost(copy, finished, line, said):
    path = copy / "results.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    made, err = run(copy)
    assert made == 0
    assert f"{path}, line 2: " in err and said in err
    assert rows(copy) == rows(finished) and pixels(copy) == pixels(finished)
    assert run(copy) == (0, "")  # said once


@pytest.mark.parametrize("damage", ["{", '{"id": "b"}', "\x00" * 40, "[]"])
def test_what_a_damaged_line_stood_for_is_made_again(copy, finished, damage):
    path = copy / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
    made, err = run(copy)
    assert made == 1 and f"{path}, line 2: " in err
    assert sorted(row["id"] for row in rows(copy)) == ["a", "b", "c"] and pixels(copy) == pixels(finished)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 3},
        {"seconds": None},
        {"guidance": float("nan")},
        {"seed": 10**400},
        {"record": {"prompt": 1}},
        {"record": None},
        {"record": {"prompt": "a", "references": "cat.jpg", "source": None}},
        {"task": ["edit"]},
        {"saved": [1]},
        {"settings": 5},
    ],
)
def test_a_line_with_a_wrong_field_counts_as_nothing(copy, change):
    path, lines = copy / "results.jsonl", rows(copy)
    lines[1] |= change
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made, err = run(copy)
    assert made == 1 and f"{path}, line 2: no line of a finished record: its {next(iter(change))} " in err


def test_of_two_lines_with_one_id_the_later_counts(copy):
    path, lines = copy / "results.jsonl", rows(copy)
    later = lines[0] | {"seconds": 99.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, later]))
    made, err = run(copy)
    assert made == 0 and f"{path}, line 1: 'a' is finished in {path}, line 4 again" in err
    assert {row["id"]: row["seconds"] for row in rows(copy)}["a"] == 99.0


# ---- damaged images --------------------------------------------------------------------------------------------------


def other_image(path):
    Image.new("RGB", (SIDE, SIDE), "red").save(path)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda path: path.write_bytes(b""), "empty (0 bytes)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be decoded"),
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "cannot be decoded"),
        (lambda path: path.write_text("<html>404</html>"), "b.png"),
        (other_image, "another image than the one that was saved"),
        (lambda path: Image.new("RGB", (9, 7)).save(path), "9 x 7, expected 16 x 16"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "b.png"),
    ],
)
def test_a_damaged_image_is_made_again(copy, finished, damage, said):
    image = copy / "images" / "b.png"
    damage(image)
    made, err = run(copy)
    assert made == 1 and str(image) in err and said in err and f"{copy / 'results.jsonl'}, line 2" in err
    assert pixels(copy) == pixels(finished)


def test_an_image_that_was_copied_or_packed_anew_stays(copy):
    image = copy / "images" / "b.png"
    Image.open(image).save(image, compress_level=9)
    os.utime(copy / "images" / "a.png", (0, 0))
    before = image.read_bytes()
    assert run(copy) == (0, "")
    assert image.read_bytes() == before


def test_a_folder_of_before_lines_had_facts_goes_on(copy, finished):
    lines = rows(copy)
    for line in lines:
        del line["saved"], line["settings"], line["record"]["resolved"]
    (copy / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (copy / "images" / "c.png").write_bytes(b"")
    made, err = run(copy)
    assert made == 1 and "line 3" in err and "line 2" not in err
    assert pixels(copy) == pixels(finished)


# ---- damaged settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [b"", b"  \n", b'{"settings": {"mod', b"\x89PNG\r\n\xff", b'{"model_type": "t5"}', b"[]"]
)
def test_lost_settings_are_named_and_written_anew(copy, finished, text):
    (copy / "config.json").write_bytes(text)
    made, err = run(copy)
    assert made == 0 and f"{copy / 'config.json'}: " in err
    assert (copy / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def test_lost_settings_do_not_let_others_in(copy):
    for text in (b"", None):
        (copy / "config.json").unlink(missing_ok=True)
        if text is not None:
            (copy / "config.json").write_bytes(text)
        for change in ({"seed": 1}, {"model": "other"}, {"vae_dtype": "bfloat16"}, {"steps": None}):
            with pytest.raises(RunError, match=f"other settings \\({next(iter(change))}: "):
                run(copy, how=replace(SETTINGS, **change))


def test_the_settings_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(RunError, match=r"config\.json: an object without .*delete the file"):
        run(tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "t5"}'


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_loses_nothing_and_a_rerun_completes(finished, tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    good, intact = pixels(finished), {"a", "b", "c"}
    for name in data.draw(st.lists(st.sampled_from(["results.jsonl", "config.json", "images/b.png", "index.html"]))):
        path = folder / name
        whole = path.read_bytes()
        start = data.draw(st.integers(0, len(whole)))
        end = data.draw(st.integers(start, min(len(whole), start + 400)))
        path.write_bytes(whole[:start] + data.draw(st.binary(max_size=30)) + whole[end:])
        if name == "images/b.png":
            intact.discard("b")
        if name == "results.jsonl":
            intact &= {row["id"] for row in whole_rows(path)}
    try:
        made, _ = run(folder)
        assert made <= 3 - len(intact)
    except RunError as error:
        assert str(folder) in str(error)  # it says what to remove
        (folder / "config.json").unlink()
        (folder / "results.jsonl").unlink()
        run(folder)
    assert pixels(folder) == good
    assert run(folder) == (0, "")


def whole_rows(path):
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and row in WHOLE:
                yield row


WHOLE: list = []


@pytest.fixture(autouse=True, scope="module")
def _whole(finished):
    WHOLE.extend(rows(finished))


# ---- two runs at once ------------------------------------------------------------------------------------------------

HOLD = """
import pathlib, sys
from mige.utils.files import folder_lock
with folder_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.processes
def test_a_second_run_is_refused_and_touches_nothing(copy):
    half = copy / "images" / ".0123456789abcdef.part"
    half.write_bytes(b"the first run is writing this")
    (copy / "failures.jsonl").write_text("{}\n")
    more = [*RECORDS, record("d")]
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    with start_python("-c", HOLD, copy, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another run writes here") as refused:
            run(copy, more)
        assert str(copy) in str(refused.value)
        assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
        first.kill()
    assert run(copy, more)[0] == 1
    assert not half.exists()


# ---- paths as files --------------------------------------------------------------------------------------------------


def test_paths_are_compared_as_files(tmp_path, monkeypatch):
    images, work = tmp_path / "images", tmp_path / "work"
    images.mkdir()
    work.mkdir()
    shutil.copy(CAT, images / "cat.jpg")
    shutil.copy(CAT, images / "other.jpg")
    (tmp_path / "linked").symlink_to(images)
    (images / "link.jpg").symlink_to("cat.jpg")
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "run", [record(path=Path("images/cat.jpg"))])[0] == 1
    spellings = [
        "images/cat.jpg",
        "./images/../images/cat.jpg",
        images / "cat.jpg",
        "linked/cat.jpg",
        "images/link.jpg",
    ]
    for place, more in ((tmp_path, spellings), (work, ["../images/cat.jpg", images / "cat.jpg"])):
        monkeypatch.chdir(place)
        for path in more:
            assert run(tmp_path / "run", [record(path=Path(path))]) == (0, "")
    for path in (images / "other.jpg", CAT):
        with pytest.raises(RunError, match="finished 'a' with another prompt or other images"):
            run(tmp_path / "run", [record(path=path)])
    (work / "images").mkdir()  # the same spelling, another file
    shutil.copy(CAT, work / "images" / "cat.jpg")
    with pytest.raises(RunError, match="finished 'a' with another prompt or other images"):
        run(tmp_path / "run", [record(path=Path("images/cat.jpg"))])


def test_data_that_moved_with_the_run_is_known_by_its_spelling(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "images").mkdir(parents=True)
    shutil.copy(CAT, project / "images" / "cat.jpg")
    monkeypatch.chdir(project)
    assert run(Path("run"), [record(path=Path("images/cat.jpg"))])[0] == 1
    monkeypatch.chdir(tmp_path)
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(moved)
    assert run(Path("run"), [record(path=Path("images/cat.jpg"))]) == (0, "")


def test_the_folders_of_the_settings_are_compared_as_files(tmp_path, monkeypatch):
    model = tmp_path / "models" / "x"
    model.mkdir(parents=True)
    (tmp_path / "models" / "y").mkdir()
    (tmp_path / "latest").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "run", how=replace(SETTINGS, model="models/x"))[0] == 3
    for spelling in (model, "latest", "./models/x/"):
        assert run(tmp_path / "run", how=replace(SETTINGS, model=str(spelling)))[0] == 0
    monkeypatch.chdir(tmp_path / "models")
    assert run(tmp_path / "run", how=replace(SETTINGS, model="x"))[0] == 0
    with pytest.raises(RunError, match="model: models/x there, y now"):
        run(tmp_path / "run", how=replace(SETTINGS, model="y"))


@pytest.mark.parametrize("names", [("a", "A"), ("Cat", "cAT")])
def test_ids_that_differ_in_case_alone_are_refused(tmp_path, names):
    first, second = (record(name) for name in names)
    run(tmp_path / "one", [first])
    for folder, records in (("one", [second]), ("both", [first, second])):
        with pytest.raises(RunError, match=f"the id '{names[1]}' differs from '{names[0]}' in nothing but case"):
            run(tmp_path / folder, records)
    assert [path.name for path in (tmp_path / "one" / "images").iterdir()] == [f"{names[0]}.png"]


# ---- places that are no folder, a disk that fails --------------------------------------------------------------------


def test_an_output_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for name, said in (("file", "is a file"), ("dangling", "is a link to"), ("file/run", "cannot be written into")):
        with pytest.raises(RunError, match=f"{name} {said}.*use another --output"):
            run(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_image_is_on_the_disk_before_its_line_and_every_rename_too(tmp_path, monkeypatch):
    """The order of what reaches the disk: fsync of a file or folder, and renames between."""
    done, real_sync, real_replace = [], os.fsync, os.replace

    def sync(handle):
        real_sync(handle)
        done.append(("sync", str(Path(f"/proc/self/fd/{handle}").readlink())))

    def replaced(source, target, **kwargs):
        real_replace(source, target, **kwargs)
        done.append(("rename", str(target)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replaced)
    run(tmp_path, RECORDS[:1])
    image, log = str(tmp_path / "images" / "a.png"), str(tmp_path / "results.jsonl")
    for n, (what, path) in enumerate(done):
        if what == "rename":
            assert done[n - 1][0] == "sync", path  # the file itself
            assert done[n + 1] == ("sync", str(Path(path).parent)), path
    line = max(n for n, (what, path) in enumerate(done) if (what, path) == ("sync", log))
    assert done.index(("rename", image)) + 1 < line
    assert {str(tmp_path / "config.json"), image, log} <= {path for what, path in done if what == "rename"} | {log}

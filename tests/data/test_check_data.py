"""tools/check_data.py as a user runs it: sound sets, errors in several files, the same report for any workers."""

import json
import re

import pytest
from conftest import ROOT, run_tool
from PIL import Image

from mige.cli import check_data

SCRIPT = ROOT / "tools" / "check_data.py"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def edit(name, **changes):
    return {
        "id": name,
        "entity_path": ["s.png"],
        "source_path": ["s.png"],
        "multi_prompt": "make<imagehere>red",
        "image": "t.png",
    } | changes


SUBJECT = {"entity_path": ["s.png"], "multi_prompt": "a<imagehere>in snow", "image": "t.png"}
SUBJECT_EDIT = {
    "entity_path": ["t.png", "s.png"],
    "source_path": ["s.png"],
    "multi_prompt": "add<imagehere>to<imagehere>",
    "image": "t.png",
}


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("s.png", "red"), ("t.png", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / name)
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    return tmp_path


def in_process(monkeypatch, capsys, *arguments):
    """The script in this process, which spares its imports: exit code, stdout, stderr."""
    return check_data.main([*map(str, arguments)]), *capsys.readouterr()


def table(stdout):
    """{file: [subject, edit, subject_edit, bad]} of the counts printed on top."""
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +(\d+)  (.+)$", stdout, re.MULTILINE)
    return {name: [int(count) for count in counts] for *counts, name in rows}


@pytest.mark.processes
def test_a_sound_set(folder, monkeypatch, capsys):
    first = write(folder / "elsewhere" / "a.json", [SUBJECT, SUBJECT, SUBJECT_EDIT])
    second = write(folder / "b.jsonl", [edit(f"e{n}") for n in range(150)])
    code, stdout, stderr = in_process(monkeypatch, capsys, first, second, "--root", folder, "--workers", 2)
    assert code == 0, stdout
    assert table(stdout) == {str(first): [2, 0, 1, 0], str(second): [0, 150, 0, 0], "total": [2, 150, 1, 0]}
    assert stdout.endswith("0 errors in 0 places, 153 good records\n")
    assert "153/153" in stderr, "a progress bar"


@pytest.mark.processes
def test_errors_in_several_files_in_order_whatever_the_workers(folder, monkeypatch, capsys):
    rows = [edit(f"e{n}") for n in range(200)]
    rows[3]["entity_path"] = rows[3]["source_path"] = ["broken.png"]
    rows[150]["image"] = "gone.png"
    del rows[151]["image"]
    rows[199]["multi_prompt"] = "two<imagehere><imagehere>"
    first = write(folder / "a.jsonl", rows)
    second = write(folder / "b.json", [SUBJECT, SUBJECT | {"image": "broken.png"}, 7])
    gone = folder / "gone.json"
    done = run_tool("check_data.py", first, gone, second, "--workers", 3)
    assert done.returncode == 1
    assert (1, done.stdout) == in_process(monkeypatch, capsys, first, gone, second, "--workers", 1)[:2]
    expected = {first: [0, 196, 0, 4], gone: [0, 0, 0, 1], second: [1, 0, 0, 2]}
    counts = table(done.stdout)
    assert {name: counts[str(name)] for name in expected} == expected and counts["total"] == [1, 196, 0, 7]
    lines = done.stdout.splitlines()[5:]
    wanted = [
        (f"{first}, record 200 (id e199): 2 <imagehere> in the prompt, 1 reference", "write one"),
        (f"{gone}: cannot be read", "check the path"),
        (f"{second}, record 3: the row is a number (7)", "write it as"),
        (f"{first}, record 152 (id e151): no target image", 'give "image"'),
        (f"{first}, record 4 (id e3): {folder / 'broken.png'}: cannot be decoded", "replace it"),
        (f"{first}, record 151 (id e150): {folder / 'gone.png'}: no such file", "correct the path"),
        (f"{second}, record 2 (id 00002): {folder / 'broken.png'}: cannot be decoded", "replace it"),
        (f"warning: {folder / 't.png'}: 198 records have this one image as their target", "check it"),
        ("7 errors in 7 places, 197 good records", ""),
    ]
    assert len(lines) == len(wanted)
    for line, (start, hint) in zip(lines, wanted, strict=True):
        assert line.startswith(start) and hint in line, line


def test_no_images(folder, monkeypatch, capsys):
    records = write(folder / "r.json", [SUBJECT, SUBJECT | {"image": "broken.png"}])
    code, stdout, _ = in_process(monkeypatch, capsys, records, "--no-images")
    assert code == 0 and "0 errors in 0 places, 2 good records" in stdout


def test_benchmark_rows_are_no_training_data(folder, monkeypatch, capsys):
    rows = write(folder / "emu.json", [{"instruction": "add a hat", "image": "s.png", "task": "add"}])
    code, stdout, _ = in_process(monkeypatch, capsys, rows, "--no-images")
    assert code == 1 and "no target image" in stdout and "Emu Edit" in stdout

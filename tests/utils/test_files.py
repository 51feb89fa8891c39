"""Files written whole, folders with one writer."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import start_python

from mige.utils.files import FolderInUseError, append_json_line, folder_lock, read_json_lines, write_text

HOLD = "import sys, pathlib; from mige.utils.files import folder_lock\n"
HOLD += "with folder_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.mark.processes
def test_a_second_writer_is_refused_until_the_first_one_dies(tmp_path):
    with start_python("-c", HOLD, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match="another run writes here") as refused, folder_lock(tmp_path):
            pass
        assert str(tmp_path) in str(refused.value)
        first.kill()
    with folder_lock(tmp_path):
        pass


def test_lines_are_appended_and_a_text_is_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "a", "text": "ä\u2028"}, {"id": "b"}]
    for row in rows:
        append_json_line(path, row)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == rows
    write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_line_is_named_and_the_others_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"a": 1}\n\n[1]\n\xff\xfe\n{"b": \n' + b'{"c": ' + b"[" * 5000 + b'\n{"d": "\\ud800"}\n{"e": 2}\r\n{"f": 3}'
    )
    rows, errors = read_json_lines(path)
    assert rows == [(1, {"a": 1}), (8, {"e": 2})]
    assert [error.removeprefix(f"{path}, line ").split(",")[0].split(" (")[0] for error in errors] == [
        "2: blank",
        "3: JSON of type list",
        "4: no UTF-8 text",
        "5: no JSON",
        "6: nested too deep",
        "7: no UTF-8 text",
        "9: cut",
    ]
    assert read_json_lines(tmp_path / "none.jsonl") == ([], [])


def test_the_thread_that_holds_a_folder_may_take_it_again(tmp_path):
    with folder_lock(tmp_path):
        with folder_lock(tmp_path / "." / ".." / tmp_path.name):
            pass
        with pytest.raises(FolderInUseError), ThreadPoolExecutor() as pool:
            pool.submit(folder_lock(tmp_path).__enter__).result()

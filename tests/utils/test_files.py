"""Files written whole, folders with one writer."""

import json
import subprocess
import sys

import pytest

from mige.utils.files import FolderInUseError, append_json_line, folder_lock, write_text

HOLD = "import sys, pathlib; from mige.utils.files import folder_lock\n"
HOLD += "with folder_lock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_writer_is_refused_until_the_first_one_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
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

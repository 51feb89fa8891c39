"""Record files as users have them: odd JSON, wrong suffixes, ids that file names confuse. Found by file and line."""

import gzip
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mige.data.parsing import make_record, read_records

ROW = {"multi_prompt": "a<imagehere>", "entity_path": ["a.jpg"]}
GOOD = json.dumps(ROW)


def read(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file, read_records([file])


DEEP = '{"multi_prompt": "a<imagehere>", "entity_path": ["a.jpg"], "x": ' + "[" * 5000 + "]" * 5000 + "}"
ODD = {
    "nested": (DEEP, "nested too deep to be read"),
    "digits": (GOOD[:-1] + ', "n": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    "nan": (GOOD[:-1] + ', "n": NaN}', "NaN, which is no JSON"),
    "infinity": (GOOD[:-1] + ', "n": [-Infinity]}', "-Infinity, which is no JSON"),
    "beyond": (GOOD[:-1] + ', "n": 1e999}', "'1e999', a number beyond every float"),
    "twice": (GOOD[:-1] + ', "multi_prompt": "other<imagehere>"}', "the field 'multi_prompt' appears twice"),
    "inner": (GOOD[:-1] + ', "x": {"a": 1, "a": 2}}', "the field 'a' appears twice"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_odd_json_is_an_error_with_file_and_line_and_the_rest_is_read(tmp_path, odd, suffix):
    row, message = ODD[odd]
    text = f"{GOOD}\n{row}\n{GOOD}\n" if suffix == "jsonl" else f"[\n{GOOD},\n{row},\n{GOOD}]"
    file, report = read(tmp_path, f"x.{suffix}", text)
    (error,) = report.errors
    line = 2 if suffix == "jsonl" else 3
    assert error.where == f"{file}, line {line}" and message in error.message and error.hint
    ids = [record.id for record in report.records]
    assert ids == (["00001"] if (odd, suffix) == ("nested", "json") else ["00001", "00003"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, DEEP, "NaN", "[NaN]"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_of_nothing_else_are_errors(tmp_path, text, suffix):
    file, report = read(tmp_path, f"x.{suffix}", text)
    assert not report.records and report.errors and report.errors[0].where.startswith(str(file))


@pytest.mark.parametrize("field", ["caption", "multi_prompt"])
def test_half_a_surrogate_pair_is_an_error(tmp_path, field):
    row = json.dumps(ROW | {field: "a<imagehere> \ud800"})
    _, report = read(tmp_path, "x.jsonl", row)
    (error,) = report.errors
    assert f"{field}" in error.message and "record 1" in error.where and "no character" in error.message


@pytest.mark.parametrize(
    "content, said",
    [
        (gzip.compress(GOOD.encode()), "a gzip archive"),
        (GOOD.encode("utf-16-le"), "UTF-16 or UTF-32 without its mark"),
        (GOOD.encode("utf-32"), "not UTF-8 but UTF-32, by its byte order mark"),
        (bytes(100), "a file of zero bytes"),
    ],
    ids=["gzip", "utf-16", "utf-32", "zeros"],
)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_what_is_no_text_is_named(tmp_path, content, said, suffix):
    file, report = read(tmp_path, f"x.{suffix}", content)
    (error,) = report.errors
    assert error.where == str(file) and said in error.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_other_encodings_are_named(tmp_path, encoding):
    content = GOOD.replace("a<", "é<").encode(encoding)
    if encoding in ("utf-16-le", "utf-16-be"):
        content = (b"\xff\xfe" if encoding.endswith("le") else b"\xfe\xff") + content
    file, report = read(tmp_path, "x.jsonl", content)
    (error,) = report.errors
    assert error.where == str(file) and ("UTF-16" if "16" in encoding else "byte 18, line 1") in error.message


def test_a_byte_order_mark_is_skipped(tmp_path):
    _, report = read(tmp_path, "x.jsonl", b"\xef\xbb\xbf" + GOOD.encode())
    assert len(report.raise_if_errors()) == 1


def test_lines_and_lists_under_the_other_suffix(tmp_path):
    for text, name, message in [
        (f"{GOOD}\n{GOOD}\n", "a.json", "it holds JSON Lines .* name it .jsonl"),
        (f"[{GOOD}, {GOOD}]", "b.jsonl", "it holds one JSON list.* name it .json"),
        (json.dumps([ROW, ROW], indent=2), "c.jsonl", "one JSON value over several lines.* name it .json"),
        (json.dumps(ROW), "d.json", "the top level is an object.* name the file .jsonl"),
    ]:
        file, report = read(tmp_path, name, text)
        (error,) = report.errors
        assert error.where == str(file)
        assert pytest.importorskip("re").search(message, str(error)), str(error)


def test_a_record_file_that_is_not_there_gets_a_hint(tmp_path):
    read(tmp_path, "x.jsonl", GOOD)
    for name, message in [("X.jsonl", "did you mean"), ("y\\..\\x.jsonl", "write "), ("none/x.jsonl", "the folder")]:
        (error,) = read_records([tmp_path / name]).errors
        assert "No such file" in error.message and message in error.hint


def test_ids_that_file_names_confuse_are_errors(tmp_path):
    rows = [ROW | {"id": name} for name in ("a", "B", "A", "b", "c")]
    file, report = read(tmp_path, "x.json", json.dumps(rows))
    assert [record.id for record in report.records] == ["a", "B", "c"]
    first, second = report.errors
    assert "'A' is already taken by" in first.message and "record 1 (id a)" in first.message
    assert "record 3 (id A)" in first.where and "upper from lower case" in first.message
    assert "record 4 (id b)" in second.where
    other = tmp_path / "y.json"
    other.write_text(json.dumps([ROW | {"id": "C"}]))
    file.write_text(json.dumps([ROW | {"id": "c"}]))
    assert [record.id for record in read_records([file, other]).raise_if_errors()] == ["x_c", "y_C"]


@pytest.mark.parametrize("name", ["CON", "nul", "Com1", "lpt9.png", "aux.tar.gz", "a.", "a.."])
def test_ids_that_windows_cannot_store_are_errors(tmp_path, name):
    _, report = read(tmp_path, "x.json", json.dumps([ROW | {"id": name}]))
    (error,) = report.errors
    assert f"{name!r}, unfit for a file name" in error.message and "CON, NUL" in error.hint


@pytest.mark.parametrize("name", ["console", "com", "com10", "null", "a.b", "CON_1"])
def test_other_ids_are_good(tmp_path, name):
    _, report = read(tmp_path, "x.json", json.dumps([ROW | {"id": name}]))
    assert [record.id for record in report.raise_if_errors()] == [name]


# ---- properties ------------------------------------------------------------------------------------------------------

FIELDS = ("id", "idx", "multi_prompt", "entity_path", "source_path", "image", "task", "instruction", "extra")
TEXT = st.text(max_size=12) | st.sampled_from(["<imagehere>", "a<imagehere>b", "a.jpg", "edit", "subject", "\ud800"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PLAIN = st.text(string.ascii_letters + string.digits + " éß漢🐱'\"\\/", min_size=1, max_size=20).filter(str.strip)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUE) | VALUE)
def test_no_row_raises(row):
    record, issues = make_record(row, where="x.json, record 1", root=Path("r"), default_id="1")
    assert (record is None) == any(issue.fatal for issue in issues)
    assert all(str(issue) for issue in issues)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_file_raises(tmp_path_factory, content):
    for suffix in ("json", "jsonl"):
        file = tmp_path_factory.getbasetemp() / f"any.{suffix}"
        file.write_bytes(content)
        report = read_records([file])
        assert report.records or report.errors


@settings(max_examples=100, deadline=None)
@given(st.lists(PLAIN, min_size=1, max_size=3), PLAIN, st.booleans(), st.sampled_from(["json", "jsonl"]))
def test_a_good_record_stays_good_through_writing_and_reading(tmp_path_factory, words, path, escaped, suffix):
    row = {"multi_prompt": "<imagehere>".join([*words, "end"]), "entity_path": [path] * len(words), "note": path}
    text = json.dumps(row, ensure_ascii=escaped)
    file = tmp_path_factory.getbasetemp() / f"good.{suffix}"
    file.write_text(text if suffix == "jsonl" else f"[{text}]", encoding="utf-8")
    (record,) = read_records([file]).raise_if_errors()
    assert record.prompt == row["multi_prompt"] and record.extra == {"note": path}
    assert record.references == (file.parent / path,) * len(words)

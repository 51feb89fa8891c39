import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from mige.data.parsing import make_record, read_records
from mige.data.records import BadRecordsError, Issue, Record, Report
from mige.tasks import TASKS, Task, placeholders

EXAMPLES = Path(__file__).parents[2] / "example_data"
SUBJECT = {"entity_path": ["a.jpg"], "multi_prompt": "a<imagehere>in the snow"}
EDIT = {"entity_path": ["s.jpg"], "source_path": ["s.jpg"], "multi_prompt": "make<imagehere>red", "image": "t.jpg"}
ADD = {
    "entity_path": ["e.jpg", "s.jpg"],
    "source_path": ["s.jpg"],
    "multi_prompt": "add<imagehere>to<ImageHere>",
    "image": "t.jpg",
    "mask_path": ["m.png"],
    "object": "cup",
    "idx": 3,
}
EMU = {
    "instruction": "Add a hat",
    "image": "s.jpg",
    "task": "add",
    "split": "test",
    "idx": 41,
    "hash": "ff",
    "input_caption": "a man",
    "output_caption": "a man with a hat",
}


def made(row, task=None):
    return make_record(row, where="x.json, record 1", root=Path("root"), default_id="00001", task=task)


def error(row, task=None):
    """The text of the only issue of a row that must not become a record."""
    record, issues = made(row, task)
    assert record is None
    assert len(issues) == 1 and issues[0].fatal, [str(issue) for issue in issues]
    return str(issues[0])


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def test_official_defaults():
    assert TASKS[Task.SUBJECT].prefix == (
        "Follow the text instruction to generate an image with the given objects' images, "
        "preserving the subject's identity:\n "
    )
    assert TASKS[Task.EDIT].prefix == "Follow the instruction to edit the image:\n "
    assert TASKS[Task.SUBJECT_EDIT].prefix == "Subject-driven editing:\n "
    rows = [(s.clean_prefix, s.steps, s.guidance, s.source_guidance, s.batch_size, s.letterbox) for s in TASKS.values()]
    assert list(TASKS) == list(Task)
    assert rows == [(True, 50, 7, 1, 5, True), (False, 60, 5, 1, 25, False), (True, 60, 5, 1, 25, False)]


def test_layouts():
    where = "x.json, record 1 (id {})"
    root = Path("root")
    expected = Record(
        "00001", Task.SUBJECT, SUBJECT["multi_prompt"], (root / "a.jpg",), None, None, None, where.format("00001")
    )
    assert made(SUBJECT) == (expected, [])
    record, _ = made(EDIT)
    assert record.task is Task.EDIT and record.extra == {}
    assert (record.references, record.source, record.target) == ((root / "s.jpg",), root / "s.jpg", root / "t.jpg")
    record, _ = made(ADD)
    assert record.task is Task.SUBJECT_EDIT and record.id == "3" and record.source == root / "s.jpg"
    assert record.references == (root / "e.jpg", root / "s.jpg")
    assert record.extra == {"mask_path": ["m.png"], "object": "cup", "idx": 3}
    record, _ = made(EMU)
    assert record.task is Task.EDIT and record.edit_type == "add" and record.target is None
    assert record.references == (record.source,) == (root / "s.jpg",)
    assert record.extra == {
        name: EMU[name] for name in ("split", "idx", "hash", "input_caption", "output_caption")
    } and record.where == where.format(41)


def test_dreambench_row_keeps_its_caption():
    record, issues = made({**SUBJECT, "prompt": "a dog in the snow"})
    assert record.extra == {"prompt": "a dog in the snow"} and not issues


def test_edit_defaults_to_its_source_as_reference():
    for row in ({**EDIT, "entity_path": []}, {key: EDIT[key] for key in ("source_path", "multi_prompt")}):
        assert made(row)[0].references == (Path("root/s.jpg"),)
    assert made({**EDIT, "multi_prompt": "make it red"})[0].prompt == "make it red"


def test_paths_and_nulls():
    record, _ = made({**SUBJECT, "entity_path": ["/far/a.jpg"], "source_path": None, "image": None})
    assert record.references == (Path("/far/a.jpg"),) and record.source is None and record.target is None


def test_records_hash_and_pickle():
    record, _ = made(ADD)
    assert pickle.loads(pickle.dumps(record)) == record
    assert len({record, replace(record, id="other"), made(ADD)[0]}) == 2


def test_placeholders_in_any_case():
    assert placeholders("a<ImageHere>b<imagehere><IMAGEHERE> <image here>") == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SUBJECT, "multi_prompt": "two<imagehere><imagehere>"}, "2 <imagehere> in the prompt, 1 reference;"),
        ({**SUBJECT, "multi_prompt": "none"}, "0 <imagehere> in the prompt, 1 reference;"),
        ({**SUBJECT, "entity_path": []}, "1 <imagehere> in the prompt, 0 references;"),
        ({"multi_prompt": "a dog"}, "0 <imagehere> in the prompt, 0 references, and no source;"),
        ({**EDIT, "multi_prompt": "<imagehere> like <imagehere>"}, "2 <imagehere> in the prompt, 1 reference;"),
        ({**ADD, "multi_prompt": "add it"}, "0 <imagehere> in the prompt, 2 references;"),
        ({**SUBJECT, "multi_prompt": " \n"}, '"multi_prompt" is empty'),
        ({**SUBJECT, "multi_prompt": None}, '"multi_prompt" is null, expected a string'),
        ({**SUBJECT, "multi_prompt": 5}, '"multi_prompt" is a number (5), expected a string'),
        ({**SUBJECT, "multi_prompt": "<imagehere>\ud800"}, "holds '\\ud800'"),
        ({"entity_path": ["a.jpg"], "prompt": "a dog"}, 'no prompt: the field "multi_prompt" is missing'),
        ({**SUBJECT, "entity_path": "a.jpg"}, "\"entity_path\" is a string ('a.jpg'), expected a list of paths"),
        ({**SUBJECT, "entity_path": [None]}, '"entity_path"[0] is null, expected a string'),
        ({**SUBJECT, "entity_path": ["a\0.jpg"]}, "\"entity_path\"[0] holds '\\x00'"),
        ({**EDIT, "source_path": "s.jpg"}, '"source_path" is a string'),
        ({**EDIT, "source_path": ["s.jpg", "t.jpg"]}, '"source_path" has 2 images, expected at most one'),
        ({**EDIT, "image": {"bytes": ""}}, '"image" is an object'),
        ({**ADD, "source_path": ["other.jpg"]}, f"the source {Path('root/other.jpg')} is not among the references"),
        ({**SUBJECT, "task": "global"}, "unknown task 'global', expected one of subject, edit, subject_edit"),
        ({**SUBJECT, "task": "edit"}, 'the task is named "edit", but the record has no source image'),
        ({**EDIT, "task": "subject"}, 'the task is named "subject", but the record has a source image and no other'),
        ({**EDIT, "task": "subject_edit"}, 'which makes it "edit"'),
        ({**ADD, "task": "edit"}, 'which makes it "subject_edit"'),
        ({**EMU, "image": None}, 'no source: the field "image" is missing or null'),
        ({**EMU, "instruction": ""}, '"instruction" is empty'),
        ({**EMU, "task": 7}, '"task" is a number (7), expected a string'),
        ({**EMU, "multi_prompt": "x"}, 'both "instruction" and "multi_prompt" are present'),
        ({**SUBJECT, "id": "a/b"}, "\"id\" is 'a/b', unfit for a file name"),
        ({**SUBJECT, "id": ".hidden"}, "unfit for a file name"),
        ({**SUBJECT, "id": "x\n"}, "unfit for a file name"),
        ({**SUBJECT, "id": "x" * 101}, "unfit for a file name"),
        ({**SUBJECT, "id": True}, '"id" is a boolean (True), expected a string or an integer'),
        (["not", "a", "row"], "the row is a list (['not', 'a', 'row']), expected an object"),
    ],
)
def test_errors(row, message):
    text = error(row)
    assert message in text and text.startswith("x.json, record 1")


def test_named_tasks():
    assert made({**SUBJECT, "task": "subject"}, Task.SUBJECT)[0].extra == {}
    assert made(EMU, Task.EDIT)[0].edit_type == "add"
    assert 'named "subject_edit"' in error(EMU, Task.SUBJECT_EDIT)
    assert 'named "subject"' in error(ADD, Task.SUBJECT)


def test_all_errors_of_a_row_are_collected():
    record, issues = made({"multi_prompt": "", "entity_path": "a.jpg", "source_path": 1, "task": "x", "id": "?"})
    assert record is None and len(issues) == 5


def test_more_than_four_references_is_a_note():
    row = {"entity_path": [f"{i}.jpg" for i in range(5)], "multi_prompt": "<imagehere>" * 5}
    record, [warning] = made(row)
    assert len(record.references) == 5 and not warning.fatal
    assert str(warning) == "warning: x.json, record 1 (id 00001): 5 references; the model was trained with at most 4"


def test_reading_goes_on_after_errors(tmp_path):
    file = write(tmp_path / "train.json", [SUBJECT, {**SUBJECT, "id": 7, "multi_prompt": "none"}, 3, SUBJECT])
    report = read_records([file])
    assert [record.id for record in report.records] == ["00001", "00004"]
    assert report.records[0].references == (tmp_path / "a.jpg",)
    assert [issue.where for issue in report.errors] == [f"{file}, record 2 (id 7)", f"{file}, record 3"]
    assert report.text().splitlines()[0] == "2 errors, 0 warnings" and len(report.text().splitlines()) == 3
    with pytest.raises(BadRecordsError) as raised:
        report.raise_if_errors()
    assert str(raised.value) == report.text()


def test_root_and_task_arguments(tmp_path):
    file = write(tmp_path / "x.json", [SUBJECT])
    assert read_records([file], root=Path("r")).raise_if_errors()[0].references == (Path("r/a.jpg"),)
    assert len(read_records([file], task=Task.EDIT).errors) == 1


def test_report_puts_errors_first():
    report = Report([], [Issue("b", "odd", "look", fatal=False), Issue("a", "bad", "mend")])
    assert report.text() == "1 error, 1 warning\na: bad; mend\nwarning: b: odd; look"
    assert report.warnings == report.issues[:1]


def test_jsonl(tmp_path):
    file = tmp_path / "x.jsonl"
    lines = [
        json.dumps(SUBJECT),
        "",
        '{"multi_prompt": }',
        json.dumps({**SUBJECT, "object": "\u2028"}, ensure_ascii=False),
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = read_records([file])
    assert [record.id for record in report.records] == ["00001", "00003"]
    assert report.records[1].extra == {"object": "\u2028"}
    assert str(report.errors[0]).startswith(f"{file}, line 3, column 18: malformed JSON: Expecting value")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[\n {"a": 1,}\n]', ", line 2, column "),
        ("x.json", b'{"data": []}', ": the top level is an object"),
        ("x.json", b"[]", ": the list is empty"),
        ("x.json", b"", ": the file is empty"),
        ("x.jsonl", b"\n \n", ": the file is empty"),
        ("x.json", '[{"multi_prompt": "é"}]'.encode("latin-1"), ": not UTF-8: "),
        ("x.csv", b"a,b", ": unknown kind of file '.csv'"),
        ("x.json", None, ": cannot be read: No such file"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    good = write(tmp_path / "good.json", [SUBJECT])
    report = read_records([file, good])
    assert len(report.records) == 1
    assert len(report.issues) == 1 and str(report.errors[0]).startswith(f"{file}{message}")


def test_folder_and_no_files(tmp_path):
    folder = tmp_path / "x.json"
    folder.mkdir()
    assert "cannot be read: Is a directory" in read_records([folder]).text()
    assert read_records([]).errors


def test_byte_order_mark(tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([SUBJECT]).encode())
    assert len(read_records([file]).raise_if_errors()) == 1


def test_duplicate_ids_in_a_file(tmp_path):
    file = write(tmp_path / "x.json", [{**SUBJECT, "id": 5}, {**SUBJECT, "id": "5"}])
    report = read_records([file])
    assert len(report.records) == 1
    assert str(report.errors[0]).startswith(f"{file}, record 2 (id 5): the id '5' is already taken by {file}, record 1")


def test_colliding_files_get_their_stem(tmp_path):
    add, rep = write(tmp_path / "add.json", [ADD, {**ADD, "idx": 9}]), write(tmp_path / "replace.json", [ADD])
    report = read_records([add, rep])
    assert [record.id for record in report.records] == ["add_3", "add_9", "replace_3"]
    assert not report.errors and "1 id used by more than one file, the first is '3'" in report.text()
    assert report.records[0].where == f"{add}, record 1 (id 3)" and report.records[0].extra["idx"] == 3
    assert [record.id for record in read_records([rep]).records] == ["3"]
    # A stem that cannot stand in an id, and a file given twice, cannot be helped.
    odd = write(tmp_path / "my set.json", [ADD])
    assert "'my set_3', is unfit for a file name" in read_records([rep, odd]).text()
    assert "the id 'replace_3' is already taken" in read_records([rep, rep]).text()


def test_example_data():
    report = read_records([EXAMPLES / f"{task}.json" for task in Task])
    assert report.issues == []
    tasks = {record.id: record.task for record in report.records}
    assert tasks["cat_and_cup"] == Task.SUBJECT and tasks["add_cup_to_cat"] == Task.SUBJECT_EDIT
    assert [sum(task == wanted for task in tasks.values()) for wanted in Task] == [2, 3, 2]

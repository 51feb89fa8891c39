"""The authors' index of subject-driven edits: small indexes in its layout, through the script."""

import json
import os

import pytest
from datasets import Dataset
from PIL import Image

from mige.cli import prepare_data
from mige.data.checks import check_images
from mige.data.parsing import read_records
from mige.data.prepare.index import located, parse_roots
from mige.data.prepare.readers import Settings, SourceError
from mige.data.prepare.run import prepare
from mige.data.prepare.samples import SkippedSample
from mige.tasks import Task

SA1B, MADE = "/path/to/SA1B", "/path/to/made"


@pytest.fixture
def photos(tmp_path):
    """Folders of images where the index has placeholders."""
    scenes = ("sa1b/a.jpg", "sa1b/b.jpg", "made/a_filled.png", "made/b_new.png")
    sizes = dict.fromkeys(scenes, (40, 30)) | {"made/a_cut.png": (8, 8), "made/b_cut.png": (9, 9)}
    for name, size in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", size, (len(name), 0, 0)).save(path)
    return tmp_path


def added(**changes):
    """The subject is listed first, and the source is a photograph from which it was removed."""
    return {
        "image": f"{SA1B}/a.jpg", "width": 40, "height": 30, "bbox": [1, 2, 3, 4], "object": "dog",
        "entity_path": [f"{MADE}/a_cut.png", f"{MADE}/a_filled.png"], "source_path": [f"{MADE}/a_filled.png"],
        "mask_path": [f"{MADE}/a_mask.png"], "multi_prompt": "add <imagehere> to <imagehere>",
    } | changes  # fmt: skip


def replaced(**changes):
    """The source is listed first."""
    return {
        "image": f"{MADE}/b_new.png", "width": 40, "height": 30, "bbox": [0, 0, 9, 9], "object": "cup",
        "entity_path": [f"{SA1B}/b.jpg", f"{MADE}/b_cut.png"], "source_path": [f"{SA1B}/b.jpg"],
        "mask_path": [], "multi_prompt": "replace the bowl in <imagehere> with <imagehere>",
    } | changes  # fmt: skip


def prepared(photos, index, *arguments):
    roots = ["--root", f"{SA1B}={photos / 'sa1b'}", "--root", f"{MADE}={photos / 'made'}"]
    out = photos / "out"
    command = ["mige_sub_edit", "--input", index, "--output", out, *(arguments or roots)]
    assert prepare_data.main([*map(str, command)]) == 0
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_rows_become_records_of_subject_editing(photos, kind):
    file = photos / f"index.{kind}"
    if kind == "parquet":
        Dataset.from_list([added(), replaced()]).to_parquet(file)
    else:
        jsonl(file, added(), replaced()) if kind == "jsonl" else file.write_text(json.dumps([added(), replaced()]))
    out = prepared(photos, file)
    first, second = records = read_records([out / "records.jsonl"]).raise_if_errors()
    assert not [issue for issue in check_images(records) if issue.fatal]
    assert [record.task for record in records] == [Task.SUBJECT_EDIT] * 2
    where = {name: photos / name for name in ("sa1b/a.jpg", "made/a_filled.png", "made/a_cut.png")}
    real = os.path.realpath
    assert [real(path) for path in first.references] == [str(where["made/a_cut.png"]), str(where["made/a_filled.png"])]
    assert real(first.source) == str(where["made/a_filled.png"]) and real(first.target) == str(where["sa1b/a.jpg"])
    assert real(second.references[0]) == real(second.source) == str(photos / "sa1b/b.jpg")
    assert second.prompt == "replace the bowl in <imagehere> with <imagehere>" and first.mask is None
    assert (first.extra["object"], first.extra["bbox"], first.extra["index_size"]) == ("dog", [1, 2, 3, 4], [40, 30])
    assert real(out / first.extra["mask_path"][0]) == str(photos / "made/a_mask.png")  # mapped, though it is not there


def test_what_is_missing_is_counted_by_origin(photos, capsys):
    (photos / "made/b_cut.png").write_bytes(b"no image")
    rows = [
        added(),
        added(image=f"{SA1B}/gone.jpg"),
        added(image=f"{SA1B}/gone.jpg", entity_path=[f"{MADE}/no.png", f"{MADE}/a_filled.png"]),
        replaced(),
        added(image="/data/other/set/deep/er/1.jpg"),
        added(image="/data/other/set/deep/2.jpg"),
        added(image=f"{SA1B}/../../secret.jpg"),
        added(image=f"{SA1B}2/a.jpg"),  # begins like a root and is none
    ]
    skipped = lines(prepared(photos, jsonl(photos / "index.jsonl", *rows)) / "skipped.jsonl")
    assert [line["reason"] for line in skipped] == [
        f"missing image of {SA1B}",
        f"missing image of {SA1B}, missing image of {MADE}",
        f"damaged image of {MADE}",
        "image below no --root of /data/other/set",
        "image below no --root of /data/other/set",
        "path with .. of /path/to/SA1B",
        "image below no --root of /path/to/SA1B2",
    ]
    assert "index.jsonl, record 2: " in skipped[0]["detail"] and "gone.jpg" in skipped[0]["detail"]
    assert f"{MADE}/no.png" in skipped[1]["detail"] and f"{SA1B}/gone.jpg" in skipped[1]["detail"]
    printed = capsys.readouterr().out
    assert "8 rows read, 1 records written, 7 samples skipped" in printed
    assert "2  image below no --root of /data/other/set" in printed


def test_rows_that_are_no_subject_edits_are_named(photos):
    rows = [
        "{broken",
        [1],
        {"image": "x"},
        added(entity_path="a.png"),
        added(multi_prompt="add <imagehere>"),
        added(source_path=[]),
        added(multi_prompt=7),
        added(multi_prompt="add <imagehere> " + "very " * 90 + "near <imagehere>"),
        added(entity_path=[f"{MADE}/a_cut.png"], multi_prompt="add <imagehere>"),
        added(),
    ]
    out = prepared(photos, jsonl(photos / "index.jsonl", *rows))
    skipped = {line["row"]: (line["reason"], line["detail"]) for line in lines(out / "skipped.jsonl")}
    assert [skipped[row][0] for row in range(7)] == [
        "no object",
        "no entity_path, source_path, multi_prompt",
        "entity_path holds no paths",
        "no valid record",
        "no valid record",
        "instruction is no text",
        "<imagehere> is not within the first 88 words",
    ]
    assert "record 3: it has image" in skipped[1][1] and "1 <imagehere> in the prompt, 2 references" in skipped[3][1]
    assert "is not among the references" in skipped[7][1]
    assert skipped[9][0] == "malformed JSON" and "index.jsonl, line 1" in skipped[9][1]
    assert [record["row"] for record in lines(out / "records.jsonl")] == [8]


def test_what_json_cannot_hold_is_no_record(photos):
    file = photos / "index.parquet"
    Dataset.from_list([added(bbox=[1.0, float("nan")]), added(bbox=[1.0, 2.0])]).to_parquet(file)
    out = prepared(photos, file)
    [record] = read_records([out / "records.jsonl"]).raise_if_errors()
    assert record.extra["bbox"] == [1.0, 2.0]
    assert [(line["row"], line["reason"]) for line in lines(out / "skipped.jsonl")] == [(0, "no valid record")]


def test_the_longest_root_wins_by_whole_names(tmp_path):
    roots = {"/a": "/x", "/a/b": "/y", "rel": "/z"}
    assert [str(located(name, roots)[0]) for name in ("/a/c.png", "/a/b/c.png", "/a/bc.png", "rel/1.png")] == [
        "/x/c.png", "/y/c.png", "/x/bc.png", "/z/1.png",
    ]  # fmt: skip
    for name in ("/b/a/c.png", "relative/1.png", "/a/b/../../etc"):
        with pytest.raises(SkippedSample):
            located(name, roots)
    (tmp_path / "here").mkdir()
    assert parse_roots([f"/a/={tmp_path / 'here'}"]) == (("/a", str(tmp_path / "here")),)
    for texts, message in (
        (["/a"], "expected OLD=NEW"),
        ([f"/a={tmp_path / 'gone'}"], "gone is no folder"),
        ([f"/a={tmp_path}", f"/a/={tmp_path}"], "given twice"),
    ):
        with pytest.raises(SourceError, match=message):
            parse_roots(texts)


def test_a_limited_run_goes_on_and_other_roots_are_refused(photos):
    file = jsonl(photos / "index.jsonl", *[added() for _ in range(3)])
    roots = parse_roots([f"{SA1B}={photos / 'sa1b'}", f"{MADE}={photos / 'made'}"])
    settings, out = Settings("mige_sub_edit", (str(file),), roots=roots), photos / "out"
    assert prepare(settings, out, limit=2, progress=False).rows == 2
    with pytest.raises(SourceError, match="other settings"):
        prepare(Settings("mige_sub_edit", (str(file),), roots=roots[:1]), out, progress=False)
    assert prepare(settings, out, progress=False).finished
    assert [record["row"] for record in lines(out / "records.jsonl")] == [0, 1, 2]


def test_errors_of_the_call(photos):
    def refused(*inputs, source="mige_sub_edit", roots=()):
        with pytest.raises(SourceError) as error:
            prepare(Settings(source, tuple(map(str, inputs)), roots=roots), photos / "out", progress=False)
        return str(error.value)

    assert "both JSON and other files" in refused("a.json", "b.parquet")
    assert "gone.json" in refused(photos / "gone.json")
    assert "line 1" in refused(jsonl(photos / "bad.jsonl", "{broken"))
    assert "--root belongs to mige_sub_edit" in refused("x", source="magicbrush", roots=(("/a", "/b"),))

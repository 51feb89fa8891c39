"""Records mapped from the disk are those that are read from the files, and so is what is said of them."""

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import start_python

from mige.data import mapping
from mige.data.checks import check_repeats, check_training_text
from mige.data.json_rows import line_blocks, parse_lines, read_rows
from mige.data.mapped_records import MappedRecords, RecordWriter, from_row, to_row
from mige.data.mapping import cache_folder, map_records
from mige.data.order import SampleOrder
from mige.data.parsing import read_records
from mige.data.records import BadRecordsError
from mige.tasks import Task

TRAIN = ROOT / "example_data" / "train.jsonl"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def row(number, **changes):
    made = {
        "multi_prompt": f"make<imagehere>blue, {number}",
        "entity_path": [f"s{number}.png"],
        "image": f"{number}.png",
    }
    return made | {"source_path": made["entity_path"], "number": number} | changes


def write(file, rows):
    text = json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows))
    file.write_text(text, encoding="utf-8")
    return file


def expected(file, **options):
    """Records without an error and every issue, by reading all of the file at once."""
    report = read_records([file], **options)
    issues, unfit = report.issues + check_repeats(report.records), []
    for place, record in enumerate(report.records):
        found = check_training_text(record)
        if any(issue.fatal for issue in found) or record.target is None:
            unfit.append(place)
        issues += found
    return report.records, unfit, issues


def assert_as_read(file, **options):
    records, unfit, issues = expected(file, **options)
    found = map_records(file, **options)
    assert list(found.records) == records == [found.records[place] for place in range(len(found.records))]
    assert found.unfit.tolist() == unfit
    targets = [issue for issue in found.issues if issue.message == 'no target, the field "image"']
    assert [issue for issue in found.issues if issue not in targets] == issues
    assert [issue.where for issue in targets] == [record.where for record in records if record.target is None]
    return found


# ---- the same as reading ---------------------------------------------------------------------------------------------


def test_the_examples_are_mapped_as_they_are_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in (TRAIN, Path("example_data/train.jsonl"), ROOT / "example_data" / "edit.json"):
        assert_as_read(file)
    assert_as_read(TRAIN, root=Path("elsewhere"))
    assert_as_read(TRAIN, task=Task.EDIT)
    assert len(list(cache_folder().glob("*/records.arrow"))) == 5


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_what_is_wrong_is_said_as_by_reading(tmp_path, monkeypatch, name):
    monkeypatch.setattr(mapping, "_BLOCK", 3)
    rows = [row(n) for n in range(12)]
    rows[1] |= {"id": "Same"}
    rows[4] |= {"id": "same"}
    rows[5] |= {"id": "same"}
    rows[2] |= {"multi_prompt": "make the photo brighter, then frame the picture"}
    rows[6] = 7
    rows[7] |= {"image": None}
    rows[8] |= {"multi_prompt": "make [imagehere] snowy, of the image"}
    for n in (0, 3, 5, 9, 10, 11):  # five count: the sixth has another's id
        rows[n] |= {"image": "./all/../all.png"}
    rows[11] |= {"extra": {"deep": [1.5, None, "\u2028", 2**70]}, "ünïcode": "雪"}
    found = assert_as_read(write(tmp_path / name, rows))
    assert len(found.records) == 9 and found.unfit.tolist() == [2, 4]
    assert sum("already taken by" in issue.message for issue in found.issues) == 2
    assert any("5 records have this one image" in issue.message for issue in found.issues)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
ROW = '{"multi_prompt": "a<imagehere>", "entity_path": ["a.png"]}'
PIECES = st.sampled_from(["{}", "[]", "\n", "\r\n", "\r", "\ufeff", "\0", " ", "{", "NaN", "1e999", '{"a": 1, "a": 2}',
                          '"\u2028"', "1" * 5000, ROW])  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(PIECES | JSON.map(json.dumps), max_size=8), junk=st.binary(max_size=2), at=st.integers(0, 60))
def test_lines_read_one_by_one_are_those_of_the_whole_file(tmp_path, pieces, junk, at):
    file, text = tmp_path / "x.jsonl", "".join(pieces).encode("utf-8", "surrogatepass")
    file.write_bytes(text[:at] + junk + text[at:])
    blocks = line_blocks(file, 2)
    if blocks is None:
        return
    rows, issues = [], []
    try:
        for block in blocks:
            found = parse_lines(str(file), block)
            rows += found[0]
            issues += found[1]
    except UnicodeDecodeError:
        return
    assert (repr(rows), issues) == (repr(read_rows(file)[0]), read_rows(file)[1])


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"\x1f\x8b1", b"[{}]", b"[\n{}\n]", b"{}\n" * 5000 + b"\xff",
                                     "{}".encode("utf-16"), b"{", b'{}\n{"a":\n', b" \n"], ids=repr)  # fmt: skip
def test_odd_files_are_refused_in_the_same_words(tmp_path, content):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    found = map_records(file)
    assert len(found.records) == 0 and found.issues == read_records([file]).issues
    assert found.issues


def test_a_file_that_cannot_be_read_is_an_error_in_the_same_words(tmp_path):
    for name in ("none.json", "a\0b.json"):
        with pytest.raises(BadRecordsError) as raised:
            map_records(tmp_path / name)
        assert str(raised.value) == read_records([tmp_path / name]).text()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(extra=st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_a_record_survives_as_text(tmp_path, extra):
    file = write(tmp_path / "x.json", [row(1) | extra, row(2, mask_path="m.png"), {"instruction": "a", "image": "b"}])
    for record in read_records([file]).records:
        assert from_row(to_row(record)) == record


# ---- the sequence ----------------------------------------------------------------------------------------------------


def mapped(file, records, **options):
    with RecordWriter(file) as writer:
        writer.add(map(to_row, records))
        assert len(writer) == len(records)
    return MappedRecords(file, **options)


@pytest.fixture
def records(tmp_path):
    return read_records([write(tmp_path / "r.json", [row(n) for n in range(40)])]).records


def test_every_choice_of_left_out_places(tmp_path, records, monkeypatch):
    monkeypatch.setattr("mige.data.mapped_records._ROWS", 7)
    monkeypatch.setattr("mige.data.mapped_records._READS", 3)
    rng, whole = np.random.default_rng(0), mapped(tmp_path / "x.arrow", records)
    for share in (0, 0.1, 0.5, 0.9, 1):
        kept, some = list(records), whole
        for _ in range(3):  # left out in several goes
            gone = np.flatnonzero(rng.random(len(kept)) < share)
            some = some.without(gone)
            kept = [record for place, record in enumerate(kept) if place not in gone]
            assert len(some) == len(kept) and list(some) == kept
            assert [some[place] for place in range(len(kept))] == kept
            for index in (len(kept), -1):
                with pytest.raises(IndexError):
                    some[index]
    assert whole.without([], fit=True).without([1]).fit and not whole.without([1]).fit


def test_spawned_workers_open_the_file_themselves(tmp_path, records):
    whole = mapped(tmp_path / "x.arrow", records).without([0])
    assert whole[3] == records[4]
    packed = pickle.dumps(whole)
    assert len(packed) < 1000 and list(pickle.loads(packed)) == records[1:]


def test_what_is_made_of_all_records_is_kept_for_these_alone(tmp_path, records):
    whole = mapped(tmp_path / "x.arrow", records)
    count = lambda some: str(sum(1 for _ in some))  # noqa: E731
    assert (whole.remembered("count", count), whole.without([3]).remembered("count", count)) == ("40", "39")
    for again in (whole, pickle.loads(pickle.dumps(whole)), MappedRecords(tmp_path / "x.arrow")):
        assert again.remembered("count", lambda _: pytest.fail("computed again")) == "40"
    assert whole.remembered("other", lambda _: "7") == "7"
    mapped(tmp_path / "y.arrow", records[:5])
    (tmp_path / "y.arrow").replace(tmp_path / "x.arrow")
    assert MappedRecords(tmp_path / "x.arrow").remembered("count", count) == "5"
    assert whole.remembered("count", count) == "40"


def test_the_order_of_samples_is_of_places_alone(tmp_path, records):
    """A set of the same records, mapped or in a list, shows them in one order."""
    order = SampleOrder([len(records)], [1.0], seed=3)
    whole = mapped(tmp_path / "x.arrow", records)
    for index in range(100):
        _, place = order.locate(index)
        assert whole[place] == records[place]


# ---- the cache -------------------------------------------------------------------------------------------------------


def conversions(caplog):
    return sum("are converted" in record.message for record in caplog.records)


def test_converted_once_and_again_when_the_content_changes(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "mige")
    file = write(tmp_path / "x.jsonl", [row(1), row(2)])
    for _ in range(3):
        map_records(file)
    os.utime(file, (1, 1))  # copied: another time, the same content
    map_records(file)
    assert conversions(caplog) == 1
    old = map_records(file).records
    write(file, [row(1), row(3)])
    assert_as_read(file)
    assert conversions(caplog) == 2
    assert old[1].target.name == "2.png", "a process that has the old file open keeps it"
    map_records(file, root=tmp_path / "images")
    monkeypatch.setattr(mapping, "_code", lambda: ["other code"])
    map_records(file)
    assert conversions(caplog) == 4


@pytest.mark.parametrize("name", ["records.arrow", "issues.jsonl", "source.json", "places.npz"])
@pytest.mark.parametrize("size", [None, 0, 20])
def test_a_damaged_cache_is_made_again(tmp_path, caplog, name, size):
    file = write(tmp_path / "x.jsonl", [row(1), row(2, image=None), 3])
    map_records(file)
    [found] = cache_folder().glob(f"*/{name}")
    if size is None:
        found.unlink()
    else:
        os.truncate(found, size)
    assert_as_read(file)


def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch):
    file = write(tmp_path / "x.jsonl", [row(n) for n in range(5)])

    def full(*_, **__):
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch:
        patch.setattr(mapping.np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            map_records(file)
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]
    assert_as_read(file)


MAP = "import sys, logging; logging.basicConfig(level=logging.INFO); from pathlib import Path; from mige.data.mapping import map_records; print(len(map_records(Path(sys.argv[1])).records))"  # noqa: E501


@pytest.mark.processes
def test_of_several_processes_one_converts(tmp_path):
    file = write(tmp_path / "x.jsonl", [row(n) for n in range(3000)])
    runs = [start_python("-c", MAP, file, stdout=-1, stderr=-1, text=True) for _ in range(3)]
    told = [run.communicate() for run in runs]
    assert [out for out, _ in told] == ["3000\n"] * 3, told
    assert sum("are converted" in err for _, err in told) == 1


@pytest.mark.processes
def test_several_processes_convert_a_large_file_as_one_does(tmp_path, monkeypatch):
    rows = [row(n, **({"id": "same"} if n in (3, 40) else {})) for n in range(50)]
    rows[30] = "no row"
    file = write(tmp_path / "x.jsonl", rows)
    alone = map_records(file)
    shutil.rmtree(cache_folder())
    monkeypatch.setattr(mapping, "_LARGE", 0)
    monkeypatch.setattr(mapping, "_BLOCK", 4)
    together = assert_as_read(file)
    assert together.issues == alone.issues and len(together.records) == 48

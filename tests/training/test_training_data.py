"""What a run trains on: packed records, what is checked before the first step, what is left out and said."""

import dataclasses
import logging
import pickle
import shutil
from collections.abc import Iterable

import pytest
from conftest import ROOT

from mige import config
from mige.data.crops import Crop
from mige.data.parsing import read_records
from mige.data.records import BadRecordsError
from mige.training.checkpointing import TrainingError
from mige.training.data import PackedRecords, check_set, stored

TRAIN = ROOT / "example_data" / "train.jsonl"


@pytest.fixture
def records():
    return read_records([TRAIN]).records


def settings(**changes) -> config.DataConfig:
    return dataclasses.replace(config.load(ROOT / "configs" / "tiny.py").data, features="store", **changes)


class Holding:
    """A store that holds all but some images; of some, the file has changed since."""

    def __init__(self, *names: str, changed: tuple[str, ...] = ()):
        self.names, self.gone_by = names, changed

    def missing(self, crops: Iterable[Crop]) -> list[Crop]:
        return [crop for crop in crops if crop.path.name in self.names]

    def changed(self, crops: Iterable[Crop]) -> list[Crop]:
        return [crop for crop in crops if crop.path.name in self.gone_by]


def test_packed_records_are_the_records(records):
    packed = PackedRecords(records)
    assert len(packed) == len(records) and list(packed) == records
    assert [packed[i] for i in (3, 0, 3)] == [records[3], records[0], records[3]]
    for index in (len(records), -1):
        with pytest.raises(IndexError):
            packed[index]
    assert len(PackedRecords([])) == 0
    assert list(pickle.loads(pickle.dumps(packed))) == records  # as spawned workers get it


def test_records_whose_pictures_are_not_stored_are_left_out_and_named(records, caplog):
    message = r"store: \d of \d+ images not in it, the first .*cat\.jpg.* of .*, record \d .*: run tools/extract"
    with pytest.raises(TrainingError, match=message):
        stored(records, Holding("cat.jpg"), settings())
    with caplog.at_level(logging.WARNING, "mige"):
        kept = stored(records, Holding("cat.jpg"), settings(skip_bad=True))
    shown = [r for r in records if any(path.name == "cat.jpg" for path in (r.target, *r.references))]
    assert 0 < len(shown) < len(records)
    assert kept == [record for record in records if record not in shown]
    assert f"store: {len(shown)} records are left out" in caplog.text
    assert all(f"{record.where}: " in caplog.text for record in shown)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mige"):
        assert stored(records, Holding(changed=("cat.jpg",)), settings(skip_bad=True)) == kept
    assert all(f"{record.where}: " in caplog.text for record in shown) and "changed or gone since" in caplog.text
    assert stored(records, Holding(), settings()) == records


def test_pictures_are_decoded_first_unless_the_set_was_checked_before(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "example_data", folder)
    broken = folder / "images" / "cat.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    report = read_records([folder / "train.jsonl"])
    with pytest.raises(BadRecordsError, match=r"cat\.jpg"):
        check_set(report, settings())
    assert check_set(report, settings(check_pictures=False)) == report.records


def test_texts_that_cancel_in_a_batch_end_the_start_by_file_and_record(tmp_path):
    """One mentions its image twice, the other loses a marker behind word 88: together they would fit."""
    import json
    from types import SimpleNamespace

    from mige.data.parsing import read_records
    from mige.data.records import BadRecordsError

    twice = {"multi_prompt": "make the photo brighter, then put a frame around the picture", "entity_path": ["s.png"]}
    late = {"multi_prompt": "add<imagehere>to it" + " word" * 88 + "<imagehere>", "entity_path": ["e.png", "s.png"]}
    rows = [row | {"source_path": ["s.png"], "image": "t.png"} for row in (twice, late)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    data = SimpleNamespace(check_pictures=False, skip_bad=False, size=512)
    with pytest.raises(BadRecordsError) as raised:
        check_set(read_records([tmp_path / "x.json"]), data)
    for number, found in ((1, "2 <imagehere> for 1 reference"), (2, "1 <imagehere> for 2 references")):
        assert (
            f"{tmp_path / 'x.json'}, record {number} (id 0000{number}): the text it is trained on has {found}"
            in str(raised.value)
        )

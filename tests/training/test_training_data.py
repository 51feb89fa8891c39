"""What a run trains on: packed records, what is checked before the first step, what is left out and said."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from test_trainer import build
from transformers import AutoTokenizer

from mige import config
from mige.data.batch import collate
from mige.data.crops import Crop
from mige.data.dataset import JointDataset, Mixture
from mige.data.mapping import map_records
from mige.data.parsing import read_records
from mige.data.records import BadRecordsError
from mige.tasks import Task
from mige.training.checkpointing import TrainingError
from mige.training.data import check_set, not_stored
from mige.utils.errors import UserError

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


def test_records_whose_images_are_not_stored_are_left_out_and_named(records, caplog, monkeypatch):
    monkeypatch.setattr("mige.training.data._CHUNK", 2)
    mapped = map_records(TRAIN).records
    assert len(mapped) == 6
    message = r"store: \d of \d+ images not in it, the first .*cat\.jpg.* of .*, record \d .*: run tools/extract"
    with pytest.raises(TrainingError, match=message):
        not_stored(mapped, [Holding("cat.jpg")], settings())
    with caplog.at_level(logging.WARNING, "mige"):
        bad = not_stored(mapped, [Holding("cat.jpg")], settings(skip_bad=True))
    shown = [r for r in records if any(path.name == "cat.jpg" for path in (r.target, *r.references))]
    assert 0 < len(shown) < len(records) and [records[place] for place in bad] == shown
    assert f"store: {len(shown)} records are left out" in caplog.text
    assert all(f"{record.where}: " in caplog.text for record in shown)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mige"):
        assert not_stored(mapped, [Holding(changed=("cat.jpg",))], settings(skip_bad=True)) == bad
    assert all(f"{record.where}: " in caplog.text for record in shown) and "changed or gone since" in caplog.text
    assert not_stored(mapped, [Holding()], settings()) == []
    shapes = np.array([place % 2 for place in range(len(records))], np.int8)
    of_one = not_stored(mapped, [Holding(), Holding("cat.jpg")], settings(skip_bad=True), shapes)
    assert of_one == [place for place in bad if place % 2] and len(of_one) < len(bad)


def test_images_are_decoded_first_unless_the_set_was_checked_before(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "example_data", folder)
    broken = folder / "images" / "cat.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    found = map_records(folder / "train.jsonl")
    with pytest.raises(BadRecordsError, match=r"cat\.jpg"):
        check_set(found, settings())
    assert list(check_set(found, settings(check_images=False))) == list(found.records)
    shown = [record for record in found.records if broken not in (record.target, *record.references)]
    assert 0 < len(shown) < len(found.records)
    assert list(check_set(found, settings(skip_bad=True))) == shown


def test_texts_that_cancel_in_a_batch_end_the_start_by_file_and_record(tmp_path):
    """One mentions its image twice, the other loses a marker behind word 88: together they would fit."""
    twice = {"multi_prompt": "make the photo brighter, then put a frame around the picture", "entity_path": ["s.png"]}
    late = {"multi_prompt": "add<imagehere>to it" + " word" * 88 + "<imagehere>", "entity_path": ["e.png", "s.png"]}
    rows = [row | {"source_path": ["s.png"], "image": "t.png"} for row in (twice, late)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    data = SimpleNamespace(check_images=False, skip_bad=False, size=512)
    with pytest.raises(BadRecordsError) as raised:
        check_set(map_records(tmp_path / "x.json"), data)
    for number, found in ((1, "2 <imagehere> for 1 reference"), (2, "1 <imagehere> for 2 references")):
        assert (
            f"{tmp_path / 'x.json'}, record {number} (id 0000{number}): the text it is trained on has {found}"
            in str(raised.value)
        )


# ---- what a dataset and a batch refuse by set, file and record -------------------------------------------------------


def joint(tiny_model, *sets, weights=None) -> JointDataset:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model / "tokenizer")
    shape = dict(size=64, latent_shape=(4, 8, 8), vision_size=28)
    return JointDataset(Mixture(sets, weights or [1.0] * len(sets)), tokenizer, seed=0, **shape)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (dict(prompt="a<imagehere>and a<imagehere>"), "2 <imagehere> for 1 reference"),
        (dict(prompt="a cat"), "0 <imagehere> for 1 reference"),
        (dict(references=()), "1 <imagehere> for 0 references"),
    ],
)
def test_a_batch_compares_markers_with_references_record_by_record(tiny_model, records, change, found):
    """Two that cancel too: each would be trained on the other's images."""
    good = next(record for record in records if record.task is Task.SUBJECT)
    bad = dataclasses.replace(good, where="b.json, record 7 (id x)", **change)
    dataset = joint(tiny_model, [good, bad])
    with pytest.raises(UserError, match=re.escape(f"b.json, record 7 (id x): its instruction has {found}")):
        collate([dataset[index] for index in range(2)])
    assert collate([next(s for s in map(dataset.__getitem__, range(2)) if s.where == good.where)]).ids == (good.id,)


def test_such_a_record_ends_a_training_by_its_name(tiny_model, tmp_path, monkeypatch):
    """Through the loader, where it has come past the check of the records."""
    monkeypatch.setattr("mige.data.mapping.check_training_text", lambda record: [])
    row = {"multi_prompt": "make the photo brighter, then frame the picture", "entity_path": ["images/cat.jpg"]}
    row |= {"id": "twice", "source_path": ["images/cat.jpg"], "image": "images/cat.jpg"}
    (tmp_path / "x.json").write_text(json.dumps([row]))
    one = {"file": str(tmp_path / "x.json"), "root": str(TRAIN.parent), "weight": 1.0}
    trainer = build(tiny_model, tmp_path / "run", f"data.sets=[{one!r}]", "train.steps=1", "train.batch_size=1")
    with pytest.raises(TrainingError, match=r"step 0: .*x.json, record 1 \(id twice\): its instruction has 2 "):
        trainer.run()


def test_a_record_without_references_is_a_sample_without_images(tiny_model, records):
    words = dataclasses.replace(records[0], task=Task.SUBJECT, prompt="a cat", references=(), source=None)
    batch = collate([joint(tiny_model, [words])[0]])
    assert batch.vision_RCHW.shape == (0, 3, 28, 28) and batch.reference_R.shape == (0,)
    assert batch.pixels_PCHW.shape == (1, 3, 64, 64)


def test_a_mixture_names_the_set_it_refuses(tiny_model, records):
    with pytest.raises(UserError, match="set 1 has no records"):
        joint(tiny_model, records, [])
    with pytest.raises(UserError, match="0 sets of records and 0 weights, expected one a set"):
        joint(tiny_model)
    with pytest.raises(UserError, match=r"the weight of set 0 is 0\.0, expected a number above 0"):
        joint(tiny_model, records, weights=[0])
    with pytest.raises(UserError, match="the weight of set 0 is 'half', expected a number above 0, or a fraction"):
        joint(tiny_model, records, weights=["half"])
    bad = dataclasses.replace(records[1], target=None, where="b.json, record 2 (id b)")
    with pytest.raises(UserError, match=re.escape('set 1, b.json, record 2 (id b): no target, the field "image"')):
        joint(tiny_model, records, [records[0], bad])


def test_a_set_of_which_nothing_is_left_is_refused_by_its_file(tiny_model, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"multi_prompt": "a<imagehere>", "entity_path": ["nowhere.png"]}]))
    sets = [{"file": str(file), "root": str(TRAIN.parent), "weight": 1.0} for file in (TRAIN, tmp_path / "x.json")]
    with pytest.raises(UserError, match=r"data.sets\[1\], .*x.json: no record is left to train on"):
        build(tiny_model, tmp_path / "run", f"data.sets={sets!r}", "data.skip_bad=True")


@pytest.mark.parametrize("weight", ["'third'", "'1/0'", "'-1/3'", "0", "True", "None", "'nan'", "'1e999'", "'1e-999'"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(config.ConfigError, match=r"data.sets\[0\].weight is .*expected a number"):
        config.load(ROOT / "configs" / "tiny.py", [f"data.sets=[{{'file': 'x.json', 'weight': {weight}}}]"])

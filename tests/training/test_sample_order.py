"""Which samples a training shows, through its script: exact weights, however a step is split; old runs refused."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import run_here
from test_trainer import BASE, TRAIN, build, metrics

from mige.training.errors import TrainingError
from mige.training.trainer import Trainer


@pytest.fixture
def sets(tmp_path) -> list[dict]:
    """Four records every other epoch, one three times in two, one in every third."""
    rows = [json.loads(text) for text in TRAIN.read_text().splitlines()]
    one = []
    for name, ids, weight in (("half", "abcd", 0.5), ("more", "m", 1.5), ("third", "t", "1/3")):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row | {"id": id}) + "\n" for row, id in zip(rows, ids, strict=False)))
        one.append({"file": str(file), "root": str(TRAIN.parent), "weight": weight})
    return one


@pytest.fixture
def train(tiny_model, sets, monkeypatch, tmp_path):
    """The ids of the samples that the script trains on, in order."""
    ids: list[str] = []
    loss = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, batch: (ids.extend(batch.ids), loss(self, batch))[1])

    def run(name: str, *more: str) -> list[str]:
        ids.clear()
        config = ("configs/tiny.py", f"train.pretrained={str(tiny_model)!r}", f"data.sets={sets!r}", *BASE, *more)
        done = run_here("train_scripts/train_mige.py", *config, "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return list(ids)

    return run


def test_two_sets_are_shown_as_often_as_their_weights_say(train, tmp_path):
    """Six epochs: 2 of `half`, 1 or 2 of `more`, and 1 of `third` in every third."""
    ids = train("run", "train.steps=23", "train.batch_size=1", "train.checkpoint_every=23")
    assert Counter(ids) == dict.fromkeys("abcd", 3) | {"m": 9, "t": 2}
    starts = [0, 3, 7, 11, 15, 18, 23]  # floor(e / 3) + floor(3 e / 2) + 2 e
    epochs = [ids[first:end] for first, end in itertools.pairwise(starts)]
    assert [epoch.count("m") for epoch in epochs] == [1, 2, 1, 2, 1, 2]
    assert [epoch.count("t") for epoch in epochs] == [0, 0, 1, 0, 0, 1]
    halves = ["".join(sorted(set(epoch) & set("abcd"))) for epoch in epochs]
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert len(first) == len(second) == 2 and set(first + second) == set("abcd")
    assert len(set(halves)) > 2  # every lap in another order
    assert metrics(tmp_path / "run")[-1]["epoch"] == pytest.approx(6)


def test_the_samples_are_the_same_however_a_step_is_split(train):
    whole = train("whole", "train.steps=3", "train.batch_size=4")
    assert train("split", "train.steps=3", "train.batch_size=1", "train.gradient_accumulation_steps=4") == whole
    first = train("parts", "train.steps=1", "train.batch_size=4")
    second = train("parts", "train.steps=3", "train.batch_size=2", "train.gradient_accumulation_steps=2")
    assert first + second == whole


def test_a_run_in_the_order_of_before_is_refused_by_name(tiny_model, tmp_path):
    short = ("train.checkpoint_every=1", "train.batch_size=1")
    build(tiny_model, tmp_path, *short, "train.steps=1").run()
    progress = Path(tmp_path, "checkpoints", "step-00000001", "progress.json")
    saved = json.loads(progress.read_text())
    del saved["invariants"]["order"]  # as version 0.1 wrote it
    progress.write_text(json.dumps(saved))
    with pytest.raises(TrainingError, match=re.escape("as this run is set: order: None there, feistel-1 now")):
        build(tiny_model, tmp_path, *short, "train.steps=2").run()

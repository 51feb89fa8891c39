"""A run reads everything once: each image, each prompt, the model folder; and runs through its steps in order."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from mige.checkpoints import folder as checkpoint
from mige.cli import infer
from mige.data import checks
from mige.data.parsing import read_records
from mige.inference import opened
from mige.inference import run as inference
from mige.inference.opened import OpenedRecords
from mige.inference.pipeline import MIGEPipeline
from mige.models import instruction
from mige.tasks import Task
from mige.utils import images

PHOTOS = ROOT / "example_data" / "images"
ROWS = [
    {"multi_prompt": "a<imagehere>in the jungle", "entity_path": ["cat.jpg"]},
    {"multi_prompt": "a<imagehere>next to a<imagehere>", "entity_path": ["cat.jpg", "cup_on_black.jpg"]},
    {"multi_prompt": "make it night", "entity_path": ["coffee.jpg"], "source_path": ["coffee.jpg"]},
    {"multi_prompt": "add<imagehere>to<imagehere>", "entity_path": ["cat.jpg", "coffee.jpg"],
     "source_path": ["coffee.jpg"]},
]  # fmt: skip


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(ROWS))
    return path


def counted(monkeypatch, module, name, counter):
    """Count the calls of a function by its first argument."""
    real = getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda first, *rest, **how: (counter.update([first]), real(first, *rest, **how))[1]
    )


def test_images_prompts_and_folder_are_read_once(lively, records, tmp_path, monkeypatch):
    seen, read, verified = Counter(), Counter(), Counter()
    monkeypatch.setattr(inference, "write_pages", lambda *_: None)  # pages draw theirs from the files
    for module in (images, checks, opened):  # whoever opens images for the model
        counted(monkeypatch, module, "open_image", seen)
    counted(monkeypatch, instruction, "tokenize", read)
    counted(monkeypatch, checkpoint, "verify", verified)
    arguments = ["--records", str(records), "--root", str(PHOTOS), "--steps", "1", "--device", "cpu"]
    assert infer.main(["--model", str(lively), *arguments, "--output", str(tmp_path / "run")]) == 0
    assert seen == {PHOTOS / f"{name}.jpg": 1 for name in ("cat", "cup_on_black", "coffee")}
    texts = [instruction.full_text(r.task, r.prompt) for r in read_records([records], root=PHOTOS).records]
    assert all(read[text] == 1 for text in texts) and len(set(texts)) == len(ROWS)
    assert verified == {Path(lively): 1}


def test_a_run_without_a_check_opens_an_image_once_too(lively, records, tmp_path, monkeypatch):
    seen = Counter()
    counted(monkeypatch, opened, "open_image", seen)
    rows = read_records([records], root=PHOTOS).records
    inference.run(rows, MIGEPipeline.from_pretrained(lively), inference.Settings("tiny", "float32", steps=1), tmp_path)
    assert set(seen.values()) == {1} and len(seen) == 3


def test_images_are_kept_up_to_a_limit(records):
    rows = read_records([records], root=PHOTOS).records
    cat = images.open_image(PHOTOS / "cat.jpg")
    small = OpenedRecords(max_bytes=4 * cat.width * cat.height)
    first, again = (small.image(PHOTOS / "cat.jpg") for _ in range(2))
    assert first is again and small.free == 0
    cup, other = (small.image(PHOTOS / "cup_on_black.jpg") for _ in range(2))
    assert cup is not other and cup.tobytes() == other.tobytes()
    edit = small.sample(rows[3])
    assert edit.source is edit.references[1]  # the same object though it was not kept


def test_the_four_steps_run_once_and_in_order(lively, monkeypatch):
    """And guidance is decided in the third: what comes before does not know it."""
    pipe, steps = MIGEPipeline.from_pretrained(lively), []
    pipe.set_progress_bar_config(disable=True)
    for name in ("prepare", "encode", "denoise", "decode"):
        real = getattr(pipe, name)

        def step(*given, name=name, real=real, **how):
            steps.append((name, real(*given, **how), given))
            return steps[-1][1]

        monkeypatch.setattr(pipe, name, step)
    how = dict(source=PHOTOS / "coffee.jpg", num_inference_steps=1, output_type="pt", seed=3)
    made = [pipe("make it night", guidance_scale=scale, **how).images for scale in (1, 6)]
    assert [name for name, _, _ in steps] == ["prepare", "encode", "denoise", "decode"] * 2
    (inputs, first), (_, second) = [[result for _, result, _ in steps[n : n + 2]] for n in (0, 4)]
    assert all(steps[n + 1][2][0] is steps[n][1] for n in (0, 1, 2, 4, 5, 6))  # each reads what the one before made
    assert inputs.task is Task.EDIT and torch.equal(first.context_BLC, second.context_BLC)
    assert not torch.equal(*made)
    assert torch.equal(made[1], (steps[7][1] / 2 + 0.5).clamp(0, 1))

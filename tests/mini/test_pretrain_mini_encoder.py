"""The encoder of MIGE-mini taught to tell its images, and what stands where in the answer."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

from mige.data.randomness import Dropout
from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.backgrounds import PLAIN_WHITE, VARIANT
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.data.synthetic.stream import WorldDataset, collate_world, vision_pixels
from mige.inference.pipeline import MIGEPipeline
from mige.mini import pretraining
from mige.models.instruction import Instruction

SCRIPT = "train_scripts/pretrain_mini_encoder.py"
TOLD = [Instruction(((5,), (6, 7), (8, 1))), Instruction(((9, 1),)), Instruction(((5, 6), (7, 1)))]  # 2, 0, 1 images


# Cases with 2, 0 and 1 subjects that are asked for.
CASES = [
    tasks.make(kind, np.random.default_rng(seed), sprites.split()[0])
    for seed, kind in enumerate(("two_references", "remove", "flip"))
]


@pytest.fixture
def few_unseen(monkeypatch):
    """Fewer cases to be measured on than docs/mini.md's figures need."""
    monkeypatch.setattr(pretraining, "UNSEEN", 16)


class Asked(torch.nn.Module):
    """A reader that notes what it was asked and says what it was told to."""

    def __init__(self, *tells: torch.Tensor):
        super().__init__()
        self.tells, self.asked = list(tells), []

    def which(self, numbers):
        return numbers

    def where(self, places):
        return places

    def forward(self, context, mask, asked):
        self.asked.append((context, mask, asked))
        return self.tells[len(self.asked) - 1]


def patches(images):
    """[R, 3, 28, 28] -> [R, 4, 588], patch by patch, each channel by channel."""
    cut = images.unfold(2, 14, 14).unfold(3, 14, 14)  # [R, 3, 2, 2, 14, 14]
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, 588)


def ask(tiny_model):
    """The shares lost if the reader tells three random images and the subjects of `CASES` right; reader, context."""
    pipeline = MIGEPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(3, 3, 28, 28, generator=generator)
    references = torch.randn(3, 4, 16, 16, generator=generator)
    answered = pretraining.answers(CASES)
    reader = Asked(patches(vision), patches(vision_pixels(draw(answered.scenes), 28)))
    lost = pretraining.read(pipeline.model, reader, TOLD, vision, references, answered)
    context, mask = pipeline.model.encoder(TOLD, vision, pipeline.model.patchify(references))
    return {name: float(share) for name, share in lost.items()}, reader, context, mask


def test_the_share_lost_is_none_of_the_truth_and_all_of_a_grey_guess():
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    told = patches(images)
    assert pretraining.lost(told, images, 14) == 0
    grey = float(pretraining.lost(told.mean(dim=(0, 1)).expand_as(told), images, 14))
    assert math.isclose(grey, 11 / 12, rel_tol=1e-5)  # twelve patches, and the variance divides by eleven


def test_every_question_goes_to_its_own_instruction(tiny_model):
    lost, reader, context, mask = ask(tiny_model)
    assert lost == {"lost": 0, "lost_answers": 0}
    by_number, by_place = reader.asked
    assert by_number[2].tolist() == [0, 1, 0]
    assert torch.equal(by_number[0], context[[0, 0, 2]]) and torch.equal(by_number[1], mask[[0, 0, 2]])
    subjects = [*CASES[0].asked, *CASES[2].asked]
    assert torch.allclose(by_place[2] * 128, torch.tensor([(s.x, s.y, s.size) for s in subjects]))
    assert torch.equal(by_place[0], context[[0, 0, 2]]) and torch.equal(by_place[1], mask[[0, 0, 2]])


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_what_is_asked_by_place_stands_in_the_answer(kind):
    made = [tasks.make(kind, np.random.default_rng(seed), sprites.split()[0], invent=True) for seed in range(20)]
    answered = pretraining.answers(made)
    if kind in ("remove", "background"):  # nothing is brought or changed that the answer shows
        assert answered is None
        return
    asked = [(row, subject) for row, case in enumerate(made) for subject in case.asked]
    assert answered.row_A.tolist() == [row for row, _ in asked]
    for number, (row, subject) in enumerate(asked):
        assert subject in made[row].target.subjects
        here = replace(subject, x=64, y=64, size=pretraining.SHOWN)
        alone = Scenes.stack([Scene(PLAIN_WHITE, np.full(VARIANT, 0.5, np.float32), (here,))])
        for name in ("sprite", "place", "colour", "other", "cut", "background"):
            assert torch.equal(getattr(answered.scenes, name)[number], getattr(alone, name)[0]), name


def test_a_batch_carries_its_own_answers(tiny_model):
    pipeline = MIGEPipeline.from_pretrained(tiny_model)
    how = dict(seed=1, size=64, latent_shape=(4, 8, 8), vision_size=28, dropout=Dropout(), noise_levels=1)
    dataset = pretraining.AnsweredDataset({"remove": 1, "flip": 1}, pipeline.tokenizer, **how)
    drawn = [dataset[index] for index in range(8)]
    batch, answered = pretraining.collate_answered(drawn)
    flips = [row for row, (_, case) in enumerate(drawn) if case.kind == "flip"]
    assert 0 < len(flips) < 8 and answered.row_A.tolist() == flips
    plain = WorldDataset({"remove": 1, "flip": 1}, pipeline.tokenizer, **how)
    assert batch.batch.ids == collate_world([plain[index] for index in range(8)]).batch.ids


def test_the_reader_does_not_look_at_padding():
    torch.manual_seed(0)
    reader = pretraining.Reader(8, 4, 6)
    context, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    asked = reader.which(torch.tensor([0, 1]))
    told = reader(context, mask, asked)
    context[0, 3:] = 1e3
    torch.testing.assert_close(reader(context, mask, asked), told)
    context[0, 2] += 1
    assert not torch.allclose(reader(context, mask, asked)[0], told[0])


def test_it_matters_what_the_reader_is_asked():
    torch.manual_seed(0)
    reader = pretraining.Reader(8, 4, 6)
    context, mask = torch.randn(1, 5, 8).expand(5, 5, 8), torch.ones(5, 5, dtype=torch.long)
    places = torch.tensor([[0.2, 0.2, 0.3], [0.8, 0.2, 0.3], [0.2, 0.2, 0.6]])
    asked = torch.cat([reader.which(torch.tensor([0, 1])), reader.where(places)])
    told = reader(context, mask, asked)
    assert all(not torch.allclose(told[i], told[j]) for i in range(5) for j in range(i))


@pytest.mark.slow
def test_the_encoder_learns_and_the_rest_stays(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 40, "--batch", 4, "--workers", 0, "--device", "cpu", "--rate", 3e-3)
    world = ("data.sets=[]", "data.world={'one_reference': 1, 'remove': 1, 'add_by_reference': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    before, after = (MIGEPipeline.from_pretrained(folder) for folder in (tiny_model, tmp_path / "on"))
    for part in ("transformer", "vae", "image_encoder", "qformer", "fusion", "text_encoder"):
        old, new = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        same = all(torch.equal(old[key], new[key]) for key in old)
        assert same == (part in ("transformer", "vae")), part
    assert before.tokenizer("a cat").input_ids == after.tokenizer("a cat").input_ids
    curve = json.loads((tmp_path / "on" / "encoder_curve.json").read_text())
    assert [line["step"] for line in curve] == [1, 40]
    for name in ("lost_unseen", "lost_answers_unseen"):
        assert curve[1][name] < 0.9 * curve[0][name], name


def test_the_reader_knows_as_many_images_as_an_instruction_of_the_world_shows():
    makers = [(kind, np.random.default_rng([n, seed])) for n, kind in enumerate(tasks.KINDS) for seed in range(20)]
    most = max(len(tasks.make(kind, rng, sprites.split()[0]).references) for kind, rng in makers)
    assert most == pretraining.MOST


def test_a_batch_without_answers_is_no_error(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 1, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.world={'remove': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    [line] = json.loads((tmp_path / "on" / "encoder_curve.json").read_text())
    assert "lost_answers" not in line and line["lost"] > 0


def test_it_ends_by_time(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 1000, "--seconds", 1e-6, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.world={'one_reference': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    assert [line["step"] for line in json.loads((tmp_path / "on" / "encoder_curve.json").read_text())] == [1]

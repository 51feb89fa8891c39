"""The encoder of MIGE-mini pretrained: reconstruction of its images, layout prediction of the answer."""

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
from mige.data.synthetic.world import SECOND
from mige.inference.pipeline import MIGEPipeline
from mige.mini import pretraining
from mige.models.instruction import Instruction

SCRIPT = "train_scripts/pretrain_mini_encoder.py"
INSTRUCTIONS = [  # of 2, 0 and 1 images
    Instruction(((5,), (6, 7), (8, 1))),
    Instruction(((9, 1),)),
    Instruction(((5, 6), (7, 1))),
]


# Cases with 2, 0 and 1 subjects that are asked for.
CASES = [
    tasks.make(kind, np.random.default_rng(seed), sprites.split()[0])
    for seed, kind in enumerate(("two_references", "remove", "flip"))
]


@pytest.fixture
def few_unseen(monkeypatch):
    """Fewer cases to be measured on than docs/mini.md's figures need."""
    monkeypatch.setattr(pretraining, "UNSEEN", 16)


class PerfectHead(torch.nn.Module):
    """A head that keeps its queries and predicts what it was given."""

    def __init__(self, *predictions: torch.Tensor):
        super().__init__()
        self.predictions, self.queries = list(predictions), []

    def by_number(self, numbers):
        return numbers

    def by_place(self, places):
        return places

    def forward(self, context, mask, query):
        self.queries.append((context, mask, query))
        return self.predictions[len(self.queries) - 1]


def patches(images):
    """[R, 3, 28, 28] -> [R, 4, 588], patch by patch, each channel by channel."""
    cut = images.unfold(2, 14, 14).unfold(3, 14, 14)  # [R, 3, 2, 2, 14, 14]
    return cut.permute(0, 2, 3, 1, 4, 5).reshape(len(images), 4, 588)


def ask(tiny_model):
    """The losses of a head that predicts three random images and the subjects of `CASES` right; head, context."""
    pipeline = MIGEPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(3, 3, 28, 28, generator=generator)
    references = torch.randn(3, 4, 16, 16, generator=generator)
    layout = pretraining.layout_of(CASES)
    head = PerfectHead(patches(vision), patches(vision_pixels(draw(layout.scenes), 28)))
    losses = pretraining.losses(pipeline.model, head, INSTRUCTIONS, vision, references, layout)
    context, mask = pipeline.model.encoder(INSTRUCTIONS, vision, pipeline.model.patchify(references))
    return {name: float(share) for name, share in losses.items()}, head, context, mask


def test_the_unexplained_variance_is_none_of_the_truth_and_all_of_a_grey_guess():
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    prediction = patches(images)
    assert pretraining.unexplained_variance(prediction, images, 14) == 0
    grey = float(pretraining.unexplained_variance(prediction.mean(dim=(0, 1)).expand_as(prediction), images, 14))
    assert math.isclose(grey, 11 / 12, rel_tol=1e-5)  # twelve patches, and the variance divides by eleven


def test_every_query_goes_to_its_own_instruction(tiny_model):
    losses, head, context, mask = ask(tiny_model)
    assert losses == {"images": 0, "layout": 0}
    by_number, by_place = head.queries
    assert by_number[2].tolist() == [0, 1, 0]
    assert torch.equal(by_number[0], context[[0, 0, 2]]) and torch.equal(by_number[1], mask[[0, 0, 2]])
    subjects = [*CASES[0].asked, *CASES[2].asked]
    assert torch.allclose(by_place[2] * 128, torch.tensor([(s.x, s.y, s.size) for s in subjects]))
    assert torch.equal(by_place[0], context[[0, 0, 2]]) and torch.equal(by_place[1], mask[[0, 0, 2]])


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_what_is_queried_by_place_is_in_the_answer(kind):
    made = [tasks.make(kind, np.random.default_rng(seed), sprites.split()[0], augment=True) for seed in range(20)]
    layout = pretraining.layout_of(made)
    if kind in ("remove", "background"):  # nothing is brought or changed that the answer shows
        assert layout is None
        return
    asked = [(row, subject) for row, case in enumerate(made) for subject in case.asked]
    assert layout.row_A.tolist() == [row for row, _ in asked]
    for number, (row, subject) in enumerate(asked):
        assert subject in made[row].target.subjects
        here = replace(subject, x=64, y=64, size=pretraining.SUBJECT_SIDE)
        alone = Scenes.stack([Scene(PLAIN_WHITE, np.full(VARIANT, 0.5, np.float32), (here,))])
        for name in ("sprite", "place", "colour", "other", "cut", "background"):
            assert torch.equal(getattr(layout.scenes, name)[number], getattr(alone, name)[0]), name


def test_a_batch_carries_its_own_layout(tiny_model):
    pipeline = MIGEPipeline.from_pretrained(tiny_model)
    how = dict(seed=1, size=64, latent_shape=(4, 8, 8), vision_size=28, dropout=Dropout(), noise_levels=1)
    dataset = pretraining.LayoutDataset({"remove": 1, "flip": 1}, pipeline.tokenizer, **how)
    drawn = [dataset[index] for index in range(8)]
    batch, layout = pretraining.collate_with_layout(drawn)
    flips = [row for row, (_, case) in enumerate(drawn) if case.kind == "flip"]
    assert 0 < len(flips) < 8 and layout.row_A.tolist() == flips
    plain = WorldDataset({"remove": 1, "flip": 1}, pipeline.tokenizer, **how)
    assert batch.batch.ids == collate_world([plain[index] for index in range(8)]).batch.ids


def test_the_head_does_not_look_at_padding():
    torch.manual_seed(0)
    head = pretraining.ReconstructionHead(8, 4, 6)
    context, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    asked = head.by_number(torch.tensor([0, 1]))
    prediction = head(context, mask, asked)
    context[0, 3:] = 1e3
    torch.testing.assert_close(head(context, mask, asked), prediction)
    context[0, 2] += 1
    assert not torch.allclose(head(context, mask, asked)[0], prediction[0])


def test_it_matters_what_the_head_is_queried_for():
    torch.manual_seed(0)
    head = pretraining.ReconstructionHead(8, 4, 6)
    context, mask = torch.randn(1, 5, 8).expand(5, 5, 8), torch.ones(5, 5, dtype=torch.long)
    places = torch.tensor([[0.2, 0.2, 0.3], [0.8, 0.2, 0.3], [0.2, 0.2, 0.6]])
    asked = torch.cat([head.by_number(torch.tensor([0, 1])), head.by_place(places)])
    prediction = head(context, mask, asked)
    assert all(not torch.allclose(prediction[i], prediction[j]) for i in range(5) for j in range(i))


@pytest.mark.slow
def test_the_encoder_learns_and_the_rest_stays(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 24, "--batch", 4, "--workers", 0, "--device", "cpu", "--rate", 3e-3)
    world = ("data.sets=[]", "data.size=64", "data.world={'one_reference': 1, 'remove': 1, 'add_by_reference': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    before, after = (MIGEPipeline.from_pretrained(folder) for folder in (tiny_model, tmp_path / "on"))
    for part in ("transformer", "vae", "image_encoder", "qformer", "fusion", "text_encoder"):
        old, new = (getattr(pipeline, part).state_dict() for pipeline in (before, after))
        same = all(torch.equal(old[key], new[key]) for key in old)
        assert same == (part in ("transformer", "vae")), part
    assert before.tokenizer("a cat").input_ids == after.tokenizer("a cat").input_ids
    curve = json.loads((tmp_path / "on" / "encoder_curve.json").read_text())
    assert [line["step"] for line in curve] == [1, 24]
    for name in ("images_unseen", "layout_unseen"):
        assert curve[1][name] < 0.9 * curve[0][name], name


def test_the_head_knows_as_many_images_as_an_instruction_of_the_world_shows():
    makers = [(kind, np.random.default_rng([n, seed])) for n, kind in enumerate(tasks.KINDS) for seed in range(20)]
    most = max(len(tasks.make(kind, rng, sprites.split()[0]).references) for kind, rng in makers)
    assert most == pretraining.MAX_IMAGES


def test_a_batch_without_layout_is_no_error(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 1, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.world={'remove': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    [line] = json.loads((tmp_path / "on" / "encoder_curve.json").read_text())
    assert "layout" not in line and line["images"] > 0


def test_it_ends_by_time(tiny_model, few_unseen, tmp_path):
    few = ("--steps", 1000, "--seconds", 1e-6, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.world={'one_reference': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    assert [line["step"] for line in json.loads((tmp_path / "on" / "encoder_curve.json").read_text())] == [1]


def test_the_second_world_is_drawn_as_itself(tiny_model, few_unseen, tmp_path, monkeypatch):
    worlds = []

    def noting(scenes, *args, world, **more):
        worlds.append(world)
        return draw(scenes, *args, world=world, **more)

    monkeypatch.setattr(pretraining, "draw", noting)
    few = ("--steps", 1, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.size=64", "data.world={'one_reference': 1}", "data.world_name='second'")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    assert len(worlds) >= 3 and set(worlds) == {SECOND}  # unseen cases, their layout, the batch's
    cases = [tasks.make("one_reference", np.random.default_rng(0), SECOND.splits()["seen"], world=SECOND)]
    assert pretraining.layout_of(cases, SECOND).scenes.background.tolist() == [SECOND.white]

"""The encoder of MIGE-mini taught to tell all of a picture."""

import json
import math

import numpy as np
import torch
from conftest import ROOT
from test_ablation import run_script

from mige.instruction import Instruction
from mige.pipeline import MIGEPipeline
from mige.world import pretraining, sprites, tasks

SCRIPT = "train_scripts/pretrain_mini_encoder.py"
TOLD = [Instruction(((5,), (6, 7), (8, 1))), Instruction(((9, 1),)), Instruction(((5, 6), (7, 1)))]  # 2, 0, 1 pictures


class Asked(torch.nn.Module):
    """A reader that notes what it was asked and says what it was told to."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, context_RLC, mask_RL, which_R):
        self.context, self.mask, self.which = context_RLC, mask_RL, which_R
        return self.answer


def ask(tiny_model, answer):
    """The share lost of three random pictures if the reader says `answer(patches)`; the reader and the model."""
    pipeline = MIGEPipeline.from_pretrained(tiny_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    vision = torch.randn(3, 3, 28, 28, generator=generator)
    references = torch.randn(3, 4, 16, 16, generator=generator)
    patches = vision.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(3, 4, 3 * 14 * 14)
    reader = Asked(answer(patches))
    lost = float(pretraining.lost(pipeline.model, reader, TOLD, vision, references))
    context, mask = pipeline.model.encoder(TOLD, vision, pipeline.model.patchify(references))
    return lost, reader, context, mask


def test_the_share_lost_is_none_of_the_truth_and_all_of_a_grey_guess(tiny_model):
    assert ask(tiny_model, lambda patches: patches)[0] == 0
    grey = ask(tiny_model, lambda patches: patches.mean(dim=(0, 1)).expand_as(patches))[0]
    assert math.isclose(grey, 11 / 12, rel_tol=1e-5)  # twelve patches, and the variance divides by eleven


def test_every_picture_is_read_from_its_own_instruction(tiny_model):
    _, reader, context, mask = ask(tiny_model, lambda patches: patches)
    assert reader.which.tolist() == [0, 1, 0]
    assert torch.equal(reader.context, context[[0, 0, 2]]) and torch.equal(reader.mask, mask[[0, 0, 2]])


def test_the_reader_does_not_look_at_padding():
    torch.manual_seed(0)
    reader = pretraining.Reader(8, 4, 6)
    context, mask, which = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), torch.tensor([0, 1])
    told = reader(context, mask, which)
    context[0, 3:] = 1e3
    torch.testing.assert_close(reader(context, mask, which), told)
    context[0, 2] += 1
    assert not torch.allclose(reader(context, mask, which)[0], told[0])
    assert not torch.allclose(reader(context, mask, which.flip(0))[0], told[0])  # it matters which picture


def test_the_encoder_learns_and_the_rest_stays(tiny_model, tmp_path):
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
    assert curve[1]["lost_unseen"] < 0.9 * curve[0]["lost_unseen"]


def test_the_reader_knows_as_many_pictures_as_an_instruction_of_the_world_shows():
    makers = [(kind, np.random.default_rng([n, seed])) for n, kind in enumerate(tasks.KINDS) for seed in range(20)]
    most = max(len(tasks.make(kind, rng, sprites.split()[0]).references) for kind, rng in makers)
    assert most == pretraining.MOST


def test_it_ends_by_time(tiny_model, tmp_path):
    few = ("--steps", 1000, "--seconds", 1e-6, "--batch", 2, "--workers", 0, "--device", "cpu")
    world = ("data.sets=[]", "data.world={'one_reference': 1}")
    run_script(SCRIPT, tmp_path / "on", "--start", tiny_model, "--config", ROOT / "configs" / "tiny.py", *world, *few)
    assert [line["step"] for line in json.loads((tmp_path / "on" / "encoder_curve.json").read_text())] == [1]

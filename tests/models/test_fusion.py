"""The two smaller encoders of the ablations: without VAE features, and with instructions of text alone."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from golden import golden_state
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from mige import config
from mige.checkpoints.key_map import load_official
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.instruction import Instruction, tokenize
from mige.training.flops import forward_flops
from mige.training.trainer import Trainer

TINY = ROOT / "configs" / "tiny.py"
SIZES = config.load(TINY).model
WITHOUT_VAE, TEXT_ONLY = {"vae_features": False}, {"num_queries": 0}
CHANGES = pytest.mark.parametrize("change", [WITHOUT_VAE, TEXT_ONLY], ids=["without_vae", "text_only"])
PROMPTS = ("make<imagehere>night", "a cat beside<imagehere>and<imagehere>")  # three images


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(change: dict) -> dict[str, torch.nn.Module]:
    """The tiny parts with such a fusion, in which every part does something."""
    parts = build_parts(replace(SIZES, fusion=dict(SIZES.fusion) | change))
    load_official(parts, golden_state(parts))
    return parts


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model / "tokenizer")


def pipeline(change: dict, tokenizer) -> MIGEPipeline:
    return MIGEPipeline(**changed(change), tokenizer=tokenizer, scheduler=DPMSolver2M())


def inputs(tokenizer) -> tuple[list[Instruction], Tensor, Tensor]:
    """Instructions, vision images and latents of three images."""
    torch.manual_seed(0)
    side = SIZES.image_encoder["image_size"]
    return [tokenize(prompt, tokenizer) for prompt in PROMPTS], torch.randn(3, 3, side, side), torch.randn(3, 4, 16, 16)


@torch.no_grad()
def test_without_vae_features_the_tokens_of_the_qformer_are_projected_as_they_are(tokenizer):
    pipe = pipeline(WITHOUT_VAE, tokenizer)
    _, vision, _ = inputs(tokenizer)
    fusion, encoder = pipe.fusion, pipe.model.encoder
    seen = pipe.image_encoder(vision).last_hidden_state
    tokens = pipe.qformer(query_embeds=fusion.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen)[0]
    expected = torch.einsum("rqc,dc->rqd", tokens, fusion.text_proj.weight) + fusion.text_proj.bias
    for patches in (torch.randn(3, 64, 64), torch.full((3, 64, 64), float("nan"))):  # not looked at
        torch.testing.assert_close(encoder.encode_images(vision, patches), expected, rtol=1e-5, atol=1e-6)


def test_without_vae_features_there_are_no_weights_of_the_fusion(tokenizer):
    whole, without = changed({})["fusion"].state_dict(), changed(WITHOUT_VAE)["fusion"].state_dict()
    assert without.keys() == {"query_tokens", "null_context", "text_proj.weight", "text_proj.bias"}
    assert whole.keys() - without.keys() == {key for key in whole if key.startswith("fusion.")}


@torch.no_grad()
def test_text_alone_is_what_the_text_encoder_makes_of_the_words(tokenizer):
    pipe = pipeline(TEXT_ONLY, tokenizer)
    instructions, vision, patches = inputs(tokenizer)

    def looked(*_):
        raise AssertionError("a part that sees images was run")

    for part in (pipe.image_encoder, pipe.qformer, pipe.fusion):
        part.register_forward_pre_hook(looked)
    context, mask = pipe.model.encoder(instructions, vision, patches)
    for row, instruction in enumerate(instructions):
        words = torch.tensor([[word for segment in instruction.segments for word in segment]])
        alone = pipe.text_encoder(words).last_hidden_state[0]
        assert int(mask[row].sum()) == words.shape[1] == instruction.length(0)
        torch.testing.assert_close(context[row, : words.shape[1]], alone, rtol=1e-4, atol=1e-5)


@CHANGES
def test_a_checkpoint_comes_back_and_makes_the_same_image(change, tokenizer, tmp_path):
    pipe = pipeline(change, tokenizer)
    pipe.save_pretrained(tmp_path / "model")
    again = MIGEPipeline.from_pretrained(tmp_path / "model")
    before, after = pipe.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    how = dict(height=64, width=64, num_inference_steps=2, output_type="latent")
    one, same, other = (
        p("make<imagehere>night", source=s, **how).images for p, s in ((pipe, red), (again, red), (pipe, blue))
    )
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-3  # the source is read, by its channels at least


def test_a_config_of_before_loads_with_vae_features(tiny_model, tokenizer, tmp_path):
    pipe = pipeline({}, tokenizer)
    pipe.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "fusion" / "config.json"
    old = json.loads(file.read_text())
    assert old.pop("vae_features") is True
    file.write_text(json.dumps(old))
    again = MIGEPipeline.from_pretrained(tmp_path / "model")
    assert again.fusion.config.vae_features is True
    _, vision, latents = inputs(tokenizer)
    with torch.no_grad():
        one, other = (p.model.encoder.encode_images(vision, p.model.patchify(latents)) for p in (pipe, again))
    assert torch.equal(one, other)


def test_the_useful_work_is_of_what_runs(tokenizer):
    whole, without, text = (
        forward_flops(pipeline(change, tokenizer).model, 64, 20, 2) for change in ({}, WITHOUT_VAE, TEXT_ONLY)
    )
    width, words, queries = SIZES.fusion["width"], SIZES.fusion["text_width"], SIZES.fusion["num_queries"]
    assert without["fusion"] == 2 * 2 * queries * width * words < whole["fusion"]
    assert (text["image_encoder"], text["qformer"], text["fusion"]) == (0, 0, 0)
    for part in ("transformer", "text_encoder"):
        assert whole[part] == without[part] == text[part]


# ---- training --------------------------------------------------------------------------------------------------------

WORLD = {
    "data.sets": [],
    "data.world": {"one_reference": 1, "remove": 1},
    "train.optimizer": "muon",
    "train.trainable": "all",
    "train.ema": 0.5,
    "train.sample_every": 0,
    "train.log_every": 1,
    "train.checkpoint_every": 1,
    "train.batch_size": 4,
    "train.lr_reference_batch": 4,
}


def trainer(change: dict, start: Path, run: Path, steps: int) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = WORLD | {"train.pretrained": str(start), "train.steps": steps}
    known = config.load(TINY).model.fusion  # what a config does not mention is as the start has it
    settings |= {f"model.fusion.{key}": value for key, value in change.items() if key in known}
    return Trainer(config.load(TINY, [f"{key}={value!r}" for key, value in settings.items()]), run)


@CHANGES
def test_training_stops_and_goes_on_to_the_same_weights(change, tokenizer, tmp_path):
    pipeline(change, tokenizer).save_pretrained(tmp_path / "start")
    whole = trainer(change, tmp_path / "start", tmp_path / "whole", 2)
    gradients = {}

    def note(name: str, gradient: Tensor) -> None:
        gradients.setdefault(name, float(gradient.abs().max()))

    for name, parameter in whole.plain.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(note, name))
    trained = {name for name, parameter in whole.plain.named_parameters() if parameter.requires_grad}
    blind = tuple(f"encoder.{part}." for part in ("image_encoder", "qformer", "fusion"))
    assert any(name.startswith(blind) for name in trained) == (change is WITHOUT_VAE)
    whole.run()
    assert gradients.keys() == trained and all(value > 0 for value in gradients.values())

    trainer(change, tmp_path / "start", tmp_path / "parts", 1).run()
    trainer(change, tmp_path / "start", tmp_path / "parts", 2).run()
    one, other = (
        MIGEPipeline.from_pretrained(tmp_path / run / "checkpoints" / "step-00000002" / "model").model.state_dict()
        for run in ("whole", "parts")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["grad_norm"] > 0 for line in lines)

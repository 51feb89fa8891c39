"""Where MIGE-mini starts: the VAE's loss, and going on with the VAE of a model that keeps the rest."""

import copy
import dataclasses
import math
from functools import partial

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import AutoencoderKL

from mige import config
from mige.cli import start_mini
from mige.inference.pipeline import MIGEPipeline
from mige.mini import vae_training
from mige.mini.start import fresh_parts, take_what_fits

SCRIPT = ROOT / "train_scripts" / "start_mini.py"


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    return AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1, **blocks)


def with_posterior(vae: AutoencoderKL, mean: float, std: float) -> AutoencoderKL:
    """The same VAE, whose posterior is this one whatever it sees."""
    channels = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias[:channels], vae.quant_conv.bias[channels:] = mean, 2 * math.log(std)
    return vae


def test_the_pull_weighs_as_if_error_and_kl_were_summed_over_an_image():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    vae = with_posterior(tiny_vae(), 0.5, 0.1)
    torch.manual_seed(1)
    loss = vae_training.reconstruction_loss(vae, images).double()
    torch.manual_seed(1)
    decoded = vae.decode(vae.encode(images).latent_dist.sample()).sample.double()
    latents = 4 * 8 * 8
    kl = latents * 0.5 * (0.5**2 + 0.1**2 - 1 - 2 * math.log(0.1))  # of one image
    error = (decoded - images).abs() + 2 * (decoded - images).square()
    across, down = (off := decoded - images)[..., 1:] - off[..., :-1], off[..., 1:, :] - off[..., :-1, :]
    edges = across.abs().mean() + down.abs().mean()
    summed = error.sum(dim=(1, 2, 3)).mean() + 1e-6 * kl
    torch.testing.assert_close(loss, summed / images[0].numel() + edges, rtol=1e-6, atol=0)


def test_the_share_of_noise():
    assert math.isclose(vae_training.noise_share(with_posterior(tiny_vae(), 0.5, 0.1), torch.zeros(2, 3, 16, 16)), 1)
    vae, images = tiny_vae(), torch.rand(2, 3, 16, 16)
    moments = vae.encode(images).latent_dist
    expected = (moments.var.mean() / (moments.var.mean() + moments.mean.var())).sqrt().item()
    assert 0.1 < expected < 0.99 and math.isclose(vae_training.noise_share(vae, images), expected, rel_tol=1e-6)


@pytest.fixture
def small_images(monkeypatch):
    """A quarter of the world's: what is asserted does not depend on it."""
    monkeypatch.setattr(vae_training, "draw", partial(vae_training.draw, side=64))


def test_finetuning_the_vae_of_a_model_keeps_the_rest(tiny_model, small_images, tmp_path):
    few = ("--steps", 2, "--batch", 4, "--workers", 0, "--device", "cpu")
    run_script("train_scripts/start_mini.py", tmp_path / "on", "--finetune", tiny_model, *few)
    before, after = (MIGEPipeline.from_pretrained(folder) for folder in (tiny_model, tmp_path / "on"))
    kept, there = before.model.state_dict(), after.model.state_dict()
    assert kept.keys() == there.keys() and all(torch.equal(kept[key], there[key]) for key in kept)
    assert before.tokenizer("a cat").input_ids == after.tokenizer("a cat").input_ids
    assert any(not torch.equal(value, after.vae.state_dict()[key]) for key, value in before.vae.state_dict().items())
    assert after.vae.config.scaling_factor != before.vae.config.scaling_factor


def test_a_vae_is_not_ignored_beside_a_model_that_brings_its_own(tiny_model, tmp_path, capsys):
    given = [tmp_path / "on", "--from-model", tiny_model, "--vae", tmp_path / "vae"]
    with pytest.raises(SystemExit, match="2"):
        start_mini.main(list(map(str, given)))
    assert "--from-model takes the model's VAE as it is" in capsys.readouterr().err
    assert not (tmp_path / "on").exists()


def test_another_vae_takes_its_place_untrained(tiny_model, small_images, tmp_path):
    other = with_posterior(MIGEPipeline.from_pretrained(tiny_model).vae, 0.5, 0.1)
    other.save_pretrained(tmp_path / "vae")
    none = ("--vae", tmp_path / "vae", "--steps", 0, "--batch", 4, "--workers", 0, "--device", "cpu")
    run_script("train_scripts/start_mini.py", tmp_path / "on", "--finetune", tiny_model, *none)
    after = MIGEPipeline.from_pretrained(tmp_path / "on").vae
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in after.state_dict().items())
    assert math.isclose(after.config.scaling_factor, 10, rel_tol=0.01)  # its latents are noise of deviation 0.1


def test_a_start_for_another_world_takes_what_fits(tiny_model):
    theirs = MIGEPipeline.from_pretrained(tiny_model)
    sizes = config.load(ROOT / "configs" / "tiny.py", []).model
    vision = sizes.image_encoder | {"image_size": sizes.image_encoder["image_size"] * 2}
    vision["patch_size"] *= 2
    text = sizes.text_encoder | {"vocab_size": sizes.text_encoder["vocab_size"] + 8}
    parts = fresh_parts(dataclasses.replace(sizes, image_encoder=vision, text_encoder=text), seed=1)
    tokenizer = copy.deepcopy(theirs.tokenizer)
    tokenizer.add_tokens(["wordthatisnew"])
    new, before = len(tokenizer) - 1, parts["text_encoder"].shared.weight.clone()
    vae = {key: value.clone() for key, value in parts["vae"].state_dict().items()}
    taken = take_what_fits(parts, tiny_model, tokenizer)

    for name in ("transformer", "qformer", "fusion"):
        own, other = parts[name].state_dict(), getattr(theirs, name).state_dict()
        assert own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)
        assert taken[name] == sum(value.numel() for value in other.values())
    words, known = parts["text_encoder"].shared.weight, theirs.text_encoder.shared.weight
    assert torch.equal(words[:new], known[:new]) and torch.equal(words[new:], before[new:])
    small = torch.rand(1, 3, 2, 2)  # stretched twofold, a smooth image gives nearly what it gave
    side = theirs.image_encoder.config.image_size
    small = torch.nn.functional.interpolate(small, size=side, mode="bilinear")
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    kernel = next(key for key, value in parts["image_encoder"].state_dict().items() if value.ndim == 4)
    outputs = []
    for tower, image in ((theirs.image_encoder, small), (parts["image_encoder"], large)):
        weight = tower.state_dict()[kernel]
        outputs.append(torch.nn.functional.conv2d(image, weight, stride=weight.shape[-1]))
    assert (outputs[0] - outputs[1]).norm() < 0.05 * outputs[0].norm()
    assert all(torch.equal(value, vae[key]) for key, value in parts["vae"].state_dict().items())

"""Pixels -> moments -> latents -> pixels, with a tiny VAE."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL

from mige.models.vae import decode, downscale, encode, scale

SCALE = 0.18215


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    sizes = dict(block_out_channels=[8, 8, 16, 16], norm_num_groups=4, layers_per_block=1, latent_channels=4)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    return AutoencoderKL(**sizes, **blocks, scaling_factor=SCALE).eval().requires_grad_(False)


def pixels(batch, height=32, width=48):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def counted(module, name, monkeypatch):
    """Sizes of the batches that `module.name` is called with."""
    real, sizes = getattr(module, name), []

    def spy(batch, *args, **kwargs):
        sizes.append(len(batch))
        return real(batch, *args, **kwargs)

    monkeypatch.setattr(module, name, spy)
    return sizes


def test_shapes_of_the_round_trip(vae):
    moments = encode(vae, pixels(2))
    assert moments.mean.shape == moments.std.shape == (2, 4, 4, 6)
    assert downscale(vae) == 8
    assert decode(vae, moments.mean).shape == (2, 3, 32, 48)


def test_moments_are_the_library_s_posterior(vae):
    image = pixels(1)
    posterior = vae.encode(image).latent_dist
    moments = encode(vae, image)
    assert torch.equal(moments.mean, posterior.mean) and torch.equal(moments.std, posterior.std)
    assert (moments.std > 0).all()


def test_a_sample_is_mean_and_noise_times_deviation(vae):
    moments = encode(vae, pixels(1))
    assert torch.equal(moments.sample(torch.zeros_like(moments.mean)), moments.mean)
    noise = torch.randn(5000, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    samples = moments.sample(noise)
    torch.testing.assert_close(samples.mean(0, keepdim=True), moments.mean, rtol=0, atol=0.1 * moments.std.max().item())
    torch.testing.assert_close(samples.std(0, keepdim=True), moments.std, rtol=0.1, atol=0)
    assert moments.sample(noise[:1].bfloat16()).dtype == torch.float32


def test_the_scale_factor_is_applied_once_each_way(vae):
    unscaled = encode(vae, pixels(1)).mean
    scaled = scale(vae, unscaled)
    torch.testing.assert_close(scaled, unscaled * SCALE)
    torch.testing.assert_close(decode(vae, scaled), vae.decode(unscaled).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("many, parts", [(8, [8]), (9, [8, 1]), (17, [8, 8, 1])])
def test_many_images_go_in_parts_with_the_same_result(vae, many, parts, monkeypatch):
    images = pixels(many, 8, 16)
    monkeypatch.setattr("mige.models.vae._CHUNK", 8 * (8 * 16) * 8)  # eight images at the 8 channels of the first block
    alone = [encode(vae, image[None]) for image in images]
    decoded_alone = [decode(vae, scale(vae, moments.mean)) for moments in alone]
    encoded, decoded = counted(vae, "encode", monkeypatch), counted(vae, "decode", monkeypatch)
    together = encode(vae, images)
    torch.testing.assert_close(together.mean, torch.cat([m.mean for m in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.std, torch.cat([m.std for m in alone]), rtol=1e-4, atol=1e-5)
    back = decode(vae, scale(vae, together.mean))
    torch.testing.assert_close(back, torch.cat(decoded_alone), rtol=1e-4, atol=1e-5)
    assert encoded == decoded == parts


def test_a_half_precision_vae_takes_float32_pixels(vae):
    half = copy.deepcopy(vae).bfloat16()
    moments = encode(half, pixels(1))
    assert moments.mean.dtype == torch.bfloat16
    assert decode(half, scale(half, moments.mean).float()).isfinite().all()

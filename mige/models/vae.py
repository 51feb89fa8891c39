"""Pixels -> VAE moments -> latents -> pixels. The one owner of the VAE's scale factor.

Two kinds of latents exist: *unscaled* posterior samples, which the feature fusion reads, and *scaled* ones
(x 0.18215 for the SD VAE), which the DiT denoises and reads as its source.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

_CHUNK = 8 * 512 * 512 * 128  # pixels x channels through the VAE: its activations are the peak of a run's memory


@dataclass(frozen=True)
class Moments:
    """The VAE's posterior: mean and standard deviation, float [B, 4, h, w]."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Unscaled latents [B, 4, h, w] from standard normal noise of that shape, in the wider of the two dtypes."""
        return self.mean + self.std * noise.to(self.mean.device)


def downscale(vae: AutoencoderKL) -> int:
    """Pixels a latent cell spans along one side (8)."""
    return downscale_of(vae.config)


def downscale_of(config: Mapping[str, Any]) -> int:
    """The same of a VAE's config alone."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def encode(vae: AutoencoderKL, pixels_BCHW: Tensor) -> Moments:
    """Moments of images, float [B, 3, H, W] in [-1, 1]."""
    parts = [vae.encode(part.to(vae.dtype)).latent_dist for part in pixels_BCHW.split(_chunk(vae, pixels_BCHW, 1))]
    return Moments(torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts]))


def _chunk(vae: AutoencoderKL, images: Tensor, times: int) -> int:
    """How many images, or latents with sides `times` smaller, go through the VAE together."""
    values = images[0, 0].numel() * times**2 * vae.config.block_out_channels[0]
    return max(1, _CHUNK // values)


def scale(vae: AutoencoderKL, unscaled_BCHW: Tensor) -> Tensor:
    """Unscaled posterior samples -> latents for the DiT, both float [B, 4, h, w], times the VAE's `scaling_factor`.

    The factor (0.18215 for the SD VAE; arXiv 2112.10752) makes their variance about 1.
    """
    return unscaled_BCHW * vae.config.scaling_factor


def decode(vae: AutoencoderKL, scaled_BCHW: Tensor) -> Tensor:
    """Scaled latents [B, 4, h, w] -> pixels, float [B, 3, H, W], about [-1, 1] (not clamped)."""
    unscaled = (scaled_BCHW / vae.config.scaling_factor).to(vae.dtype)
    return torch.cat([vae.decode(part).sample for part in unscaled.split(_chunk(vae, unscaled, downscale(vae)))])

"""Images through the VAE's encoder at the rate of the device: in which precision, compiled, with no wait for copies.

Letters: N images, C latent channels; levels are uint8 [N, H, W, 3], rows are moments [N, 2, C, h, w], mean then std.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.meta import PRECISIONS
from mige.models.vae import Moments, encode
from mige.utils.images import pixels_of

CHUNK = 8
"""Images through the VAE at once: fixed, as a network's last bits depend on the shape of its input."""

ENOUGH_DB = 60.0
"""PSNR of moments from which on bfloat16 is taken: an error of a thousandth of their range, some .8 % of their standard
deviation, where the smallest timestep of training adds noise of 1 %."""


class Encoder:
    """A copy of a VAE's encoder that takes levels on the host and gives rows on their way back to it.

    Args:
        vae: in float32, on the device to encode on; stays as it is.
        precision: "float32" or "bfloat16", of weights and activations; images come in and moments go out in float32.
        compiled: send the encoder through the compiler (a minute at its first images); False on a CPU.
    """

    def __init__(self, vae: AutoencoderKL, precision: str = "float32", *, compiled: bool = False):
        self.device, self.vae = vae.device, vae
        if precision != "float32" or compiled or self.on_gpu:
            layout = torch.channels_last if self.on_gpu else torch.preserve_format
            self.vae = nn.Module.to(copy.deepcopy(vae), PRECISIONS[precision], memory_format=layout)
        if compiled:
            self.vae.encoder.compile()

    @property
    def on_gpu(self) -> bool:
        """Whether copies can run beside the computation."""
        return self.device.type == "cuda"

    @torch.inference_mode()
    def __call__(self, levels: Tensor) -> Callable[[], np.ndarray]:
        """Enqueue the encoding of levels (pinned, on a GPU); what comes back waits for the rows, float32.

        Raises StoreError if memory is short.
        """
        try:
            moments = self.moments(levels.to(self.device, non_blocking=True))
            rows = torch.stack([moments.mean, moments.std], dim=1).float()
            if not self.on_gpu:
                return rows.numpy
            host = torch.empty(rows.shape, pin_memory=True).copy_(rows, non_blocking=True)
        except torch.OutOfMemoryError as error:
            raise StoreError(f"out of memory with {len(levels)} images at a time: give a smaller batch size") from error
        done = torch.cuda.Event()
        done.record()

        def arrived() -> np.ndarray:
            done.synchronize()
            return host.numpy()

        return arrived

    @torch.inference_mode()
    def moments(self, levels: Tensor) -> Moments:
        """Moments of levels on the device, [N, C, h, w] in the precision."""
        pixels = pixels_of(levels)
        if self.on_gpu:
            pixels = pixels.to(memory_format=torch.channels_last)
        return encode(self.vae, pixels)


def psnr(vae: AutoencoderKL, levels: Tensor, precision: str) -> float:
    """How near moments in a precision come to exact float32 ones, dB; inf where they are equal.

    20 log10 of the range of the exact means over the root of the mean square error of what training draws, mean + std *
    noise. Exact is without TF32, which a GPU's convolutions use by default.
    levels: of photographs, uint8 [N, H, W, 3].
    """
    levels = levels.to(vae.device)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        exact = Encoder(vae).moments(levels)
    other = Encoder(vae, precision).moments(levels)
    error = (other.mean.double() - exact.mean).square().mean() + (other.std.double() - exact.std).square().mean()
    extent = (exact.mean.max() - exact.mean.min()).double()
    return float(20 * extent.log10() - 10 * error.log10())

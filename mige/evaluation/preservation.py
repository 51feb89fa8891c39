"""How much of an image is kept: PSNR, SSIM and LPIPS, of all of it or of a region, with torchmetrics.

Regions are what a mask says may change (inside) and the rest (outside). SSIM and LPIPS look at neighbourhoods, so near
the border of a region they see some of what is beyond it.
"""

import copy
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.functional.image.lpips import (
    _LPIPS,
)  # the class behind its metric, which cannot take weights of a file
from torchvision.models import AlexNet_Weights

from mige.checkpoints.official_files import read_weights
from mige.utils.errors import UserError

Region = np.ndarray | None
"""Bool [H, W]: the pixels that count; None for all."""

MAX_PSNR = 100.0
"""dB, of images that are equal: a mean over samples must be finite. One level of 256 everywhere is 48 dB."""


def psnr(output: Image.Image, other: Image.Image, region: Region = None) -> float:
    """Peak signal-to-noise ratio of two RGB images of one size, dB, at most 100; over the region [H, W] if given."""
    a, b = _pixels(output), _pixels(other)
    if region is not None:
        a, b = (x[:, :, torch.from_numpy(region)] for x in (a, b))
    return min(MAX_PSNR, float(peak_signal_noise_ratio(a, b, data_range=1.0)))


def ssim(output: Image.Image, other: Image.Image, region: Region = None) -> float:
    """Structural similarity of two RGB images of one size (Wang et al. 2004), Gaussian window of 11 px, in [-1, 1].

    The mean over all pixels and channels, or those of the region [H, W]; images are mirrored at the border, which the
    paper leaves out.
    """
    a, b = _pixels(output), _pixels(other)
    whole, local_BCHW = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
    return float(whole) if region is None else float(local_BCHW[0][:, torch.from_numpy(region)].mean())


class Lpips:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018): weighted squared distance of unit features, summed over five layers.

    Args:
        weights: a .pth file of torchvision's AlexNet; None: torchvision's own, fetched. The weights of the distance
            come with torchmetrics. device: on which it runs, in float32.

    Raises CheckpointError for a file that cannot be read, UserError for one of other tensors.
    """

    def __init__(self, weights: str | Path | None = None, device: str = "cpu"):
        if weights is None:
            state = AlexNet_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        else:
            state = read_weights(Path(weights))
        self.network, self.device = _LPIPS(net="alex", pnet_rand=True), device
        slices = {f"slice{n}.{name}": layer for n in range(1, 6)
                  for name, layer in getattr(self.network.net, f"slice{n}").named_children()}  # fmt: skip
        try:
            for name, layer in slices.items():
                own = f"features.{name.split('.')[1]}."
                layer.load_state_dict({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
        except (AttributeError, RuntimeError) as error:
            raise UserError(f"{weights}: no weights of torchvision's AlexNet ({error}); give its .pth file") from error
        self.network.to(device)
        self.regional = copy.copy(self.network)  # the same layers, their distances upsampled to the image's size
        self.regional.spatial = True
        self.one_at_a_time = threading.Lock()

    @torch.inference_mode()
    def __call__(self, output: Image.Image, other: Image.Image, region: Region = None) -> float:
        """The distance of two RGB images of one size, 0 or more; over the region [H, W], if given, the map's mean."""
        a, b = (_pixels(image).to(self.device) for image in (output, other))
        with self.one_at_a_time:
            if region is None:
                return float(self.network(a, b, normalize=True))
            return float(self.regional(a, b, normalize=True)[0, 0][torch.from_numpy(region).to(self.device)].mean())


def _pixels(image: Image.Image) -> Tensor:
    """RGB -> float32 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255

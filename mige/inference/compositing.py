"""What becomes of a decoded image: put back into its source, or held to a mask of it.

Letters: H, W of an image.
"""

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from mige.diffusion.solver import Denoise
from mige.inference.samples import Sample
from mige.utils import images

SEAM = 8
"""Px inside a mask, at the size of the output, over which the source becomes the result."""


def finish(made: Image.Image, sample: Sample, paste_back: bool) -> Image.Image:
    """The image of a sample as it is returned.

    Args:
        made: as decoded.
        paste_back: put it back into its source, at the source's own resolution.

    Outside the sample's mask the result equals the source bit for bit: the source as it is where it is pasted back,
    else as it was fitted to the size of the output. Inside, `SEAM` px blend the one into the other.
    """
    source, mask = sample.source, sample.mask
    if source is None or not (paste_back or mask):
        return made
    height, width = made.height, made.width
    if not paste_back:
        fitted = fit_source(source, sample.whole, height, width)
        return _blend(fitted, made, mask_of_output(sample, height, width), SEAM)
    box = visible_box(source.size, sample.whole, height, width)
    patch = made.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    pasted = source.copy()
    pasted.paste(patch, box[:2])
    if mask is None:
        return pasted
    allowed = Image.new("L", source.size)
    allowed.paste(mask.crop(box), box[:2])
    return _blend(source, pasted, allowed, SEAM * max(1.0, patch.width / width))


def fit_source(source: Image.Image, whole: bool, height: int, width: int) -> Image.Image:
    """The source as the model sees it: all of it, squeezed by less than a step of the grid, or its centre."""
    return (images.squeeze if whole else images.center_crop)(source, height, width)


def visible_box(size: tuple[int, int], whole: bool, height: int, width: int) -> tuple[int, int, int, int]:
    """What of a source (`size`: width, height) an output shows: left, top, right, bottom, px of the source."""
    if whole:
        return 0, 0, *size
    tall, wide = images.covering(size, height, width)
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    across, down = size[0] / wide, size[1] / tall
    return round(left * across), round(top * down), round((left + width) * across), round((top + height) * down)


def mask_of_output(sample: Sample, height: int, width: int) -> Image.Image:
    """A sample's mask at the size of its output, mode "L", 0 and 255.

    Raises ValueError where none of it is in what the output shows.
    """
    fitted = fit_source(sample.mask, sample.whole, height, width).point([0] * 128 + [255] * 128)
    if fitted.getbbox() is None:
        raise ValueError(f"nothing of the mask is left at {width} x {height} px: make its white region larger, or give "
                         "a size that shows it")  # fmt: skip
    return fitted


def mask_of_latent(sample: Sample, shape: torch.Size, cell: int) -> Tensor:
    """Float32 [1, h, w]: 1 for a cell of the latent with any pixel that may change; all 1 without a mask.

    shape: of the latent, [4, h, w]; cell: px of a latent cell along one side.
    """
    if sample.mask is None:
        return torch.ones(1, *shape[1:])
    fitted = mask_of_output(sample, shape[1] * cell, shape[2] * cell)
    pixels = torch.from_numpy(np.asarray(fitted).copy()).float()[None] / 255
    return torch.nn.functional.max_pool2d(pixels, cell)


def hold(estimate: Denoise, mask_B1HW: Tensor, source_BCHW: Tensor, log_alphas: Tensor) -> Denoise:
    """A noise estimate under which everything outside a mask leads to the source.

    Where the mask is 0 the estimate is the one that makes the source, float [B, 4, h, w], scaled, of x: at every step
    the latent there is the source's, as noisy as the step's (as RePaint keeps what is known, arXiv 2201.09865,
    with the noise that denoising started from).

    log_alphas: float32 [T], of the schedule's training times.
    """

    def held(x_BCHW: Tensor, t: Tensor) -> Tensor:
        eps_BCHW, table = estimate(x_BCHW, t), log_alphas.to(x_BCHW.device)
        left = t.floor().long().clamp(0, len(table) - 2)
        log_alpha = torch.lerp(table[left], table[left + 1], (t - left).float())
        alpha, sigma = log_alpha.exp(), (1 - (2 * log_alpha).exp()).sqrt()
        kept_BCHW = (x_BCHW - alpha * source_BCHW.float()) / sigma
        return torch.where(mask_B1HW > 0, eps_BCHW, kept_BCHW)

    return held


def _blend(source: Image.Image, made: Image.Image, mask: Image.Image, seam: float) -> Image.Image:
    """The source outside a mask, bit for bit; inside it the made image, over `seam` px a mixture."""
    allowed = np.asarray(mask) > 0
    depth = distance_transform_edt(allowed)  # px to the nearest that stays; 1 at the edge
    if allowed.all():
        return made
    weight = np.minimum(depth / (min(seam, depth.max() - 1) + 1), 1.0)[..., None].astype(np.float32)
    before, after = np.asarray(source, np.float32), np.asarray(made, np.float32)
    mixed = (before + weight * (after - before)).round().astype(np.uint8)
    return Image.fromarray(np.where(allowed[..., None], mixed, np.asarray(source)))

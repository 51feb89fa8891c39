"""The measures, each as it is published; features and images in, one number a sample out, computed in float64.

Letters: D features.
"""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige.utils.images import center_crop


def cosine(a_D: Tensor, b_D: Tensor) -> float:
    """Cosine of two feature vectors [D], in [-1, 1]; NaN where one of them is zero.

    Raises ValueError for NaN or infinite features.
    """
    a, b = _finite(a_D), _finite(b_D)
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm > 0 else math.nan


def direction(edited_D: Tensor, source_D: Tensor, caption_D: Tensor, source_caption_D: Tensor) -> float:
    """CLIPdir: cosine of the change of the image with the change of the caption (Gal et al. 2021; Emu Edit).

    All features [D] are normalised before they are subtracted, as in InstructPix2Pix. In [-1, 1]; NaN where nothing
    changes. Raises ValueError for NaN or infinite features.
    """
    moved = _unit(edited_D) - _unit(source_D)
    asked = _unit(caption_D) - _unit(source_caption_D)
    return cosine(moved, asked)


def l1(output: Image.Image, target: Image.Image, region: np.ndarray | None = None) -> float:
    """Mean absolute difference of two RGB images of one size, in [0, 1]; over the region, bool [H, W], if given."""
    return float(np.abs(_levels(output, target)[... if region is None else region]).mean())


def l2(output: Image.Image, target: Image.Image, region: np.ndarray | None = None) -> float:
    """Mean squared difference of two RGB images of one size, in [0, 1]: MagicBrush's L2, without a root.

    region: bool [H, W], over which the mean is; None: all.
    """
    return float(np.square(_levels(output, target)[... if region is None else region]).mean())


PIXELS = {"l1": l1, "l2": l2}
"""What scoring always has of the measures of pixels; `preservation` has the others."""


def to_target(output: Image.Image, target: Image.Image) -> tuple[Image.Image, Image.Image]:
    """MagicBrush's rule for two sizes, and of scripts made from its: the output is stretched (bicubic) to the other's.

    A crop that shows a part of a wider image is so compared with all of it: a perfect copy is no longer one.
    """
    return (output if output.size == target.size else output.resize(target.size, Image.Resampling.BICUBIC)), target


def to_output(output: Image.Image, source: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Emu Edit's source and an output of another size: the source is scaled and cropped as the model was shown it."""
    return output, (source if output.size == source.size else center_crop(source, output.height, output.width))


def _levels(output: Image.Image, target: Image.Image) -> np.ndarray:
    if output.size != target.size:
        raise ValueError(f"images of {output.size} and {target.size} px, expected one size")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (output, target))
    return a - b


def _unit(features_D: Tensor) -> Tensor:
    features = _finite(features_D)
    return features / features.norm()


def _finite(features_D: Tensor) -> Tensor:
    features = features_D.to(torch.float64)
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinite values; check the backbone's weights")
    return features

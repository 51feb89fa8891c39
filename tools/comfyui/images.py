"""ComfyUI's images and masks <-> PIL's: float [B, H, W, C] and [B, H, W] in 0..1."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_images(name: str, images_BHWC: Tensor) -> list[Image.Image]:
    """Float [B, H, W, C], C of 1, 3 or 4 -> B RGB images; what lies beyond 0..1 is clipped, as ComfyUI's nodes do.

    Raises ValueError naming the input for anything else, and for values that are not finite.
    """
    from mige.utils.images import as_image

    _check(name, images_BHWC, 4, "[B, H, W, C]")
    if images_BHWC.shape[3] not in (1, 3, 4):
        raise ValueError(f"{name} has {images_BHWC.shape[3]} channels, expected 1, 3 or 4: convert it to RGB")
    return [as_image(image.clamp(0, 1).numpy()) for image in images_BHWC.detach().cpu().float()]


def to_masks(mask_BHW: Tensor) -> list[Image.Image]:
    """Float [B, H, W] or [H, W] -> B masks, mode "L": 255 from 0.5 on, where the source may change, else 0.

    Raises ValueError for anything else, and for a mask of which nothing is white.
    """
    mask_BHW = mask_BHW[None] if isinstance(mask_BHW, Tensor) and mask_BHW.ndim == 2 else mask_BHW
    _check("mask", mask_BHW, 3, "[B, H, W]")
    white_BHW = (mask_BHW >= 0.5).cpu().numpy()
    if not white_BHW.any((1, 2)).all():
        raise ValueError("mask is black, so nothing may change: paint what may in the mask editor, or unplug it")
    return [Image.fromarray(white.astype(np.uint8) * 255) for white in white_BHW]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """B RGB images of one size -> float32 [B, H, W, 3] in 0..1, on the CPU."""
    return torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 255)


def _check(name: str, value: Any, axes: int, expected: str) -> None:
    got = f"a tensor {list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    if not isinstance(value, Tensor) or value.ndim != axes or not value.is_floating_point() or not value.numel():
        raise ValueError(f"{name} is {got}, expected floats {expected} in 0..1, as ComfyUI's images are")
    if not value.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: look at the node that makes it")

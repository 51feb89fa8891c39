"""Masks: which pixels of an image may change. White (128 and above) may, black stays."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from mige.utils.arrays import is_tensor
from mige.utils.bad_image import BadImageError
from mige.utils.images import as_image, open_image

if TYPE_CHECKING:
    from torch import Tensor


def as_mask(value: "Image.Image | np.ndarray | Tensor | Any", size: tuple[int, int], **options: Any) -> Image.Image:
    """`value` as an image of mode "L" that holds 0 and 255 only.

    Args:
        value: what `as_image` takes, or an array or tensor of truth values [H, W]. Transparency counts as black.
        size: width and height of the image that it belongs to, px, upright.
        options: as of `as_image`.

    Raises BadImageError for another size, for a mask without a white pixel, and as `as_image`.
    """
    if is_tensor(value):
        value = value.detach().cpu().numpy() if value.ndim == 2 else value
    if isinstance(value, np.ndarray) and value.dtype == bool:
        value = value.astype(np.uint8) * 255
    mask = as_image(value, **options).convert("L").point([0] * 128 + [255] * 128)
    name = f"mask {value}" if isinstance(value, str) or hasattr(value, "is_file") else "mask"
    if mask.size != size:
        problem = f"{mask.width} x {mask.height} px, but its source has {size[0]} x {size[1]} px"
        raise BadImageError(name, problem, "make it as large as the source, upright")
    if mask.getbbox() is None:
        raise BadImageError(name, "has no white pixel, so nothing may change", "paint white what may change")
    return mask


def open_mask(path: Path, size: tuple[int, int], *, max_pixels: int) -> Image.Image:
    """The mask in a file, as `as_mask` gives it; of one with transparent pixels, those may change, as OpenAI has it.

    path, size, max_pixels and errors: as of `as_image` and `as_mask`; BadImageError names the file "mask" there.
    """
    mask = open_image(path, max_pixels=max_pixels)  # whole, and cheap enough to open once more
    with Image.open(path) as image:
        if image.has_transparency_data:
            alpha = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
            if alpha.getextrema()[0] < 128:
                mask = ImageOps.invert(alpha)
    return as_mask(mask, size, max_pixels=max_pixels)

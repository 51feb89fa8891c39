"""Fitting images, and the way between RGB images and tensors.

Resampling is PIL's, as torchvision does it on PIL images, bit for bit. torch is imported where a tensor is made, so
that checks of data need none.
"""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mige.utils.bad_image import BadImageError, check_size

if TYPE_CHECKING:
    from torch import Tensor, dtype

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def check_shape(size: tuple[int, int], height: int, width: int, *, letterboxed: bool = False) -> None:
    """Raise BadImageError for an image (`size`: width, height) too long to be fitted to height x width.

    Cropped, its scaled form would exceed MAX_PIXELS; letterboxed, its short side would be less than a pixel.
    """
    if letterboxed:
        if min(size[1] * width / size[0], size[0] * height / size[1]) < 1:
            message = f"fitted into {width} x {height} its short side is less than 1 px"
            raise BadImageError(_shape(size), message, "crop it")
        return
    check_size(f"{_shape(size)} scaled to cover {width} x {height}", covering(size, height, width)[::-1])


def center_crop(image: Image.Image, height: int, width: int, *, like: tuple[int, int] | None = None) -> Image.Image:
    """Scale (bilinear, antialiased) to cover height x width, then cut out the centre; the mode is kept.

    like: width and height of the image whose crop this one shares: it is scaled to the shape which that one is scaled
      to, so that both show the same part (see `data/crops.py`). None: its own.
    For a square this is torchvision's Resize(size) + CenterCrop(size), bit for bit. Raises BadImageError where the
    image is so long that its scaled form would exceed MAX_PIXELS.
    """
    check_shape(like or image.size, height, width)
    tall, wide = covering(like or image.size, height, width)
    scaled = image if image.size == (wide, tall) else image.resize((wide, tall), Image.Resampling.BILINEAR)
    left, top = round((wide - width) / 2), round((tall - height) / 2)
    return scaled.crop((left, top, left + width, top + height))


def squeeze(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bilinear, antialiased) the whole image to height x width; the mode is kept."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bicubic) the whole image to fit height x width, centred on black; RGB in and out.

    Raises BadImageError for an image so long that its short side would be less than a pixel.
    """
    check_shape(image.size, height, width, letterboxed=True)
    if image.width * height >= image.height * width:
        fitting = (width, int(width * image.height / image.width))
    else:
        fitting = (int(height * image.width / image.height), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(
        _require_rgb(image).resize(fitting, Image.Resampling.BICUBIC),
        ((width - fitting[0]) // 2, (height - fitting[1]) // 2),
    )
    return canvas


def to_levels(image: Image.Image) -> "Tensor":
    """RGB image -> uint8 [H, W, 3], its levels. Raises ValueError for any other mode."""
    import torch

    return torch.from_numpy(np.array(_require_rgb(image)))


def to_pixels(image: Image.Image) -> "Tensor":
    """RGB image -> float32 [3, H, W] in [-1, 1]. Raises ValueError for any other mode."""
    return pixels_of(to_levels(image))


def pixels_of(levels_HWC: "Tensor") -> "Tensor":
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [-1, 1], on its device: the same bits on every one."""
    return _unit(levels_HWC) * 2 - 1


def vision_levels(image: Image.Image, size: int) -> "Tensor":
    """RGB image -> uint8 [size, size, 3], squeezed to a square (bicubic). Raises ValueError for any other mode."""
    return to_levels(_require_rgb(image).resize((size, size), Image.Resampling.BICUBIC))


def vision_pixels(image: Image.Image, size: int) -> "Tensor":
    """RGB image -> float32 [3, size, size], normalised for the vision tower; squeezed to a square (bicubic).

    Raises ValueError for any other mode.
    """
    return vision_pixels_of(vision_levels(image, size))


def vision_pixels_of(levels_HWC: "Tensor") -> "Tensor":
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W], normalised for the vision tower, by the same bits anywhere."""
    mean, std = (levels_HWC.new_tensor(c, dtype=_float32())[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return (_unit(levels_HWC) - mean) / std


def to_pil(pixels: "Tensor") -> list[Image.Image]:
    """Float [B, 3, H, W], clamped to [-1, 1] -> B RGB images, rounded to the nearest of 256 levels.

    Raises ValueError for another shape and for pixels that are NaN or infinite.
    """
    import torch

    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}, expected [B, 3, H, W]")
    finite = pixels.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"images {bad} of {len(pixels)} hold NaN or infinite pixels; decode in a wider precision")
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = levels.permute(0, 2, 3, 1).contiguous()  # before they leave a GPU, which is quicker at it
    return [Image.fromarray(image) for image in rows.cpu().numpy()]


def _unit(levels_HWC: "Tensor") -> "Tensor":
    """uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [0, 1].

    The divisor is a tensor: a GPU would multiply by the reciprocal of a number, which rounds otherwise.
    """
    levels_CHW = levels_HWC.movedim(-1, -3).contiguous().to(_float32())
    return levels_CHW / levels_CHW.new_full((), 255.0)


def _float32() -> "dtype":
    import torch

    return torch.float32


def covering(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Height and width of an image of `size` (width, height) scaled to cover height x width, px."""
    if size[0] * height >= size[1] * width:
        return height, int(height * size[0] / size[1])
    return int(width * size[1] / size[0]), width


def _shape(size: tuple[int, int]) -> str:
    return f"image of {size[0]} x {size[1]}"


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"image of mode {image.mode}, expected RGB; open it with open_image or as_image")
    return image

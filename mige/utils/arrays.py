"""NumPy arrays and tensors as images."""

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mige.utils.bad_image import BadImageError, check_size

if TYPE_CHECKING:
    from torch import Tensor


def is_tensor(value: Any) -> bool:
    """Whether `value` is a torch tensor, without importing torch: who holds one has imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def from_tensor(tensor: "Tensor", max_pixels: int) -> Image.Image:
    """[C, H, W] or [1, C, H, W], C of 1, 3 or 4; uint8, or float in [0, 1] as diffusers has it -> an 8-bit image."""
    import torch

    name = f"tensor of shape {list(tensor.shape)}, {tensor.dtype}"
    if tensor.ndim == 4 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4):
        raise BadImageError(name, "expected [C, H, W] or [1, C, H, W] with C of 1, 3 or 4", "permute it, or take one")
    if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.uint16):
        raise BadImageError(name, "expected uint8, uint16 or float in [0, 1]", "convert it")
    if tensor.is_meta or tensor.layout is not torch.strided:
        kind = "without data (meta)" if tensor.is_meta else f"of layout {tensor.layout}"
        raise BadImageError(name, f"a tensor {kind}, expected a plain one", "use .to_dense(), or load its data")
    plain = tensor.detach().cpu()
    plain = plain.float() if plain.is_floating_point() else plain  # NumPy knows no bfloat16
    return _from_values(name, plain.permute(1, 2, 0).numpy(), max_pixels)


def from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    """[H, W] or [H, W, C], C of 1, 3 or 4; uint8, uint16, or float in [0, 1] -> an 8-bit image (L, RGB or RGBA)."""
    name = f"array of shape {list(array.shape)}, {array.dtype}"
    if np.ma.is_masked(array):
        raise BadImageError(name, "masked values", "fill them, as with array.filled(0)")
    array = np.asarray(array)  # of a subclass the plain array: a matrix has two axes whatever is asked of it
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = "transpose it: channels come last" if array.ndim == 3 else "take one image of it"
        raise BadImageError(name, "expected [H, W] or [H, W, C] with C of 1, 3 or 4", hint)
    return _from_values(name, array, max_pixels)


def _from_values(name: str, values: np.ndarray, max_pixels: int) -> Image.Image:
    """[H, W, C] -> an 8-bit image."""
    check_size(name, (values.shape[1], values.shape[0]), max_pixels)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if np.issubdtype(values.dtype, np.floating):
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # NaN fails both
            hint = "scale it; [-1, 1] becomes [0, 1] by x / 2 + 0.5"
            raise BadImageError(name, f"values from {low:g} to {high:g}, expected 0 to 1", hint)
        values = (values * 255).round()
    elif values.dtype == np.uint16:
        values = (values.astype(np.uint32) + 128) // 257  # the inverse of v * 257
    elif values.dtype != np.uint8:
        raise BadImageError(name, "expected uint8, uint16 or float in [0, 1]", "convert it")
    levels = np.ascontiguousarray(values.astype(np.uint8))
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)

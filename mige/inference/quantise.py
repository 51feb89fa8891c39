"""Weights in 8 or 4 bits: matrices stored as rounded codes, made floats again just before their product.

Every group of 64 neighbouring numbers of a row has its own lowest value and step (round to nearest, no calibration). It
saves memory, not time. Meant for the text encoder, which runs once an image and is most of the model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64
"""Numbers that share a lowest value and a step; a row is padded to a multiple of it."""


class QuantisedLinear(nn.Module):
    """A linear layer whose weight [out, in] is kept in `bits` bits a number, 4 or 8.

    Buffers: `codes`, uint8 [out, groups, 64], or two 4-bit codes a byte, [out, groups, 32]; `low` and `step`, of the
    weight's dtype, [out, groups, 1].
    """

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__()
        self.bits, self.columns = bits, linear.in_features
        groups = F.pad(linear.weight.detach().float(), (0, -self.columns % GROUP)).unflatten(1, (-1, GROUP))
        low = groups.amin(2, keepdim=True)
        step = ((groups.amax(2, keepdim=True) - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("low", low.to(linear.weight.dtype))  # [out, groups, 1]
        self.register_buffer("step", step.to(linear.weight.dtype))
        codes = ((groups - self.low.float()) / self.step.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
        self.register_buffer("codes", codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """An empty tensor, [0], of the products' dtype: transformers' T5 asks its layers for it."""
        return self.step.new_empty(0)

    def dequantised(self) -> Tensor:
        """The weight, float [out, in] of the linear layer's dtype, as near as the codes have it."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(2)
        return (codes * self.step + self.low).flatten(1)[:, : self.columns]

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., in] in the weight's dtype -> [..., out]."""
        return F.linear(x, self.dequantised(), self.bias)


def is_plain(layer: nn.Linear) -> bool:
    """Whether a linear layer holds its weight [out, in] as floats, not as a library's quantiser keeps it."""
    return type(layer) is nn.Linear and type(layer.weight.data) is Tensor and layer.weight.is_floating_point()


def check_plain(part: nn.Module, name: str, what: str) -> None:
    """Raise ValueError for a part that `what` cannot be done with, as a quantiser has its layers already."""
    for path, layer in part.named_modules():
        if isinstance(layer, nn.Linear) and not is_plain(layer):
            held = type(layer.weight.data if type(layer) is nn.Linear else layer).__name__
            raise ValueError(f"{what} needs plain weights, but {name}.{path} is quantised ({held}): load the model "
                             f"without a quantization_config of {name!r}")  # fmt: skip


def quantise(module: nn.Module, bits: int) -> None:
    """Exchange every linear layer inside the module. Raises ValueError for other bits than 4 and 8."""
    if bits not in (4, 8):
        raise ValueError(f"weights can be kept in 4 or 8 bits, not {bits}")
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, QuantisedLinear(child, bits))

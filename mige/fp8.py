"""Linear layers whose products are computed in 8-bit floating point (e4m3): an approximation, for Ada and Hopper GPUs.

A weight is rounded once, with a scale for every row; an input when it comes, with a scale for every row (token): the
largest magnitude of a row becomes 448, the largest that the format has. Each rounded value is off by at most 2^-4 of
itself, or by 2^-10 of its row's scale where it is subnormal. Sums are wider (float32, in a GPU's fast mode a little
less), so nothing else is lost but the output's own rounding.

Letters: M tokens, K channels in, N channels out.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 value."""

_MULTIPLE = 16  # of both widths of a weight: the GPU's kernels read 16 bytes at a time


class Rounded(NamedTuple):
    """A matrix of rounded rows: `values` times `scale`."""

    values: Tensor  # e4m3 [M, K], row-major
    scale: Tensor  # float32 [M, 1]


def _round_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    x_MK = x_MK.float()
    # A row of zeros has a scale too; below the smallest normal number a quotient would be off, or infinite.
    scale_M1 = (x_MK.abs().amax(1, keepdim=True) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    return (x_MK / scale_M1).to(E4M3), scale_M1


def _round_gelu(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    return _round_rows(F.gelu(x_MK.float(), approximate="tanh"))


# A function for either width of the model: the compiler makes a size that changes symbolic, and its kernel slower.
round_rows, round_gelu = (torch.compile(f, fullgraph=True) for f in (_round_rows, _round_gelu))


def require(device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where fp8 products cannot run: GPUs before Ada, and other weights than bfloat16 on a GPU.

    A CPU computes the products of the same rounded values in float32, for weights of any dtype: to see the rounding.
    """
    if device.type == "cpu":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise ValueError(f"fp8: {name} has no 8-bit products, which need compute capability 8.9 (Ada, Hopper) or more")
    if dtype is not torch.bfloat16:
        raise ValueError(f"fp8: a GPU's 8-bit products need a model in bfloat16, got {dtype}")


@dataclass(frozen=True)
class Fp8Linear:
    """A weight of rounded rows and its bias, called as a function; in place of `mige.denoiser.Linear`."""

    weight: Tensor  # e4m3 [N, K], row-major
    scale: Tensor  # float32 [1, N]
    bias: Tensor  # [N], in the dtype of the output

    @classmethod
    def of(cls, *layers: nn.Linear) -> "Fp8Linear":
        """Layers of one input, as one product. Raises ValueError where `require` does, and for widths off 16."""
        weight = torch.cat([layer.weight.detach() for layer in layers])
        require(weight.device, weight.dtype)
        if any(width % _MULTIPLE for width in weight.shape):
            raise ValueError(f"fp8: widths must be multiples of {_MULTIPLE}, got a weight of {list(weight.shape)}")
        rounded = Rounded(*_round_rows(weight))
        return cls(rounded.values, rounded.scale.view(1, -1), torch.cat([layer.bias.detach() for layer in layers]))

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        """Tokens [M, K], or what `gelu` of the layer before returned -> [M, N]."""
        values, scale = x if isinstance(x, Rounded) else round_rows(x)
        if values.is_cuda:
            return torch._scaled_mm(
                values,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale,
                bias=self.bias,
                out_dtype=self.bias.dtype,
                use_fast_accum=True,
            )
        product_MN = F.linear(values.float(), self.weight.float())
        return (product_MN * scale * self.scale + self.bias).to(self.bias.dtype)

    def gelu(self, x_MK: Tensor) -> Rounded:
        """GELU (tanh) of the product, rounded in the same kernel for the next layer's."""
        return Rounded(*round_gelu(self(x_MK)))

"""One transformer block of the DiT, arranged for sampling: compiled sums, products and attention.

The sums around the norms are compiled (three small kernels); everything else is a library call. Letters: B samples of
all branches, N patches, M = B x N tokens, L context positions, C channels, H heads, D channels a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# What a padded key adds to the product with any query. Softmax sees it times D^-0.5, -1931 at 72 channels, and its
# float32 exponential is zero from 104 below the largest score on: valid scores would have to be below -1800. They are a
# few hundred at most, and a padded key has nothing else in it. Exact in bfloat16 and float16.
PADDED_SCORE = -(2.0**14)

# In order of speed at head sizes 72 and 80 on a Hopper GPU; those that a device or a precision rules out are skipped.
CROSS_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SELF_BACKENDS = [SDPBackend.CUDNN_ATTENTION, *CROSS_BACKENDS]


# ---- the sums around the norms, compiled -----------------------------------------------------------------------------


def _modulate(x_MC: Tensor, shift_C: Tensor, scale_C: Tensor) -> Tensor:
    return F.layer_norm(x_MC, x_MC.shape[-1:], eps=1e-6) * (1 + scale_C) + shift_C


def _add(x_MC: Tensor, more_MC: Tensor, gate_C: Tensor) -> Tensor:
    return x_MC + gate_C * more_MC


def _add_modulate(
    x_MC: Tensor, more_MC: Tensor, gate_C: Tensor, shift_C: Tensor, scale_C: Tensor
) -> tuple[Tensor, Tensor]:
    x_MC = _add(x_MC, more_MC, gate_C)
    return x_MC, _modulate(x_MC, shift_C, scale_C)


modulate, add, add_modulate = (torch.compile(f, fullgraph=True) for f in (_modulate, _add, _add_modulate))


# ---- matrix products and attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A weight [out, in] and its bias [out], called as a function."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, *layers: torch.nn.Linear) -> "Linear":
        """Layers of one input, as one product; a single one shares its tensors."""
        if len(layers) == 1:
            return cls(layers[0].weight, layers[0].bias)
        return cls(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x_MC: Tensor) -> Tensor:
        """GELU (tanh) of the product, [M, in] -> [M, out]; on a GPU in the product's own kernel (arXiv 1606.08415)."""
        if x_MC.is_cuda:
            return torch._addmm_activation(self.bias, x_MC, self.weight.t(), use_gelu=True)
        return F.gelu(self(x_MC), approximate="tanh")


def attend(q_BHND: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, scale: float, backends: list[SDPBackend]) -> Tensor:
    """Attention by the first of the backends that applies: [B, H, N, D] on [B, H, L, D] -> [B x N, H x D]."""
    with sdpa_kernel(backends, set_priority=True):
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHLD, v_BHLD, scale=scale)
    return out_BHND.transpose(1, 2).flatten(0, 1).flatten(1)


def padded_head_dim(head_size: int) -> int:
    """Channels of a padded head: one more at least, and a multiple of 8, of which flash attention reads."""
    return head_size + 8 - head_size % 8


@dataclass(frozen=True)
class Cross:
    """The products before and after cross-attention: of the tokens, for its queries, and of its result."""

    q: Linear
    out: Linear

    def pad_heads(self, heads: int) -> "Cross":
        """The same for heads of `padded_head_dim` channels, in new tensors."""
        q_HDC, bias_HD = self.q.weight.unflatten(0, (heads, -1)), self.q.bias.unflatten(0, (heads, -1))
        size = q_HDC.shape[1]
        more = padded_head_dim(size) - size
        bias_HD = F.pad(bias_HD, (0, more))
        bias_HD[:, size] = 1.0
        out_CHD = F.pad(self.out.weight.unflatten(1, (heads, -1)), (0, more))
        return Cross(
            q=Linear(F.pad(q_HDC, (0, 0, 0, more)).flatten(0, 1), bias_HD.flatten()),
            out=Linear(out_CHD.flatten(1), self.out.bias),
        )


@dataclass(frozen=True)
class Block:
    """The products of one transformer block."""

    qkv: Linear
    out: Linear
    cross: Cross
    cross_padded: Cross  # for contexts with padding
    cross_kv: Linear
    up: Linear
    down: Linear

    @classmethod
    def of(cls, block: torch.nn.Module) -> "Block":
        """Of a PixArt transformer's block; queries, keys and values are joined, padded heads added."""
        own, other, mlp = block.attn1, block.attn2, block.ff.net
        cross = Cross(q=Linear.of(other.to_q), out=Linear.of(other.to_out[0]))
        return cls(
            qkv=Linear.of(own.to_q, own.to_k, own.to_v),
            out=Linear.of(own.to_out[0]),
            cross=cross,
            cross_padded=cross.pad_heads(other.heads),
            cross_kv=Linear.of(other.to_k, other.to_v),
            up=Linear.of(mlp[0].proj),
            down=Linear.of(mlp[2]),
        )

    def tensors(self) -> list[Tensor]:
        """All weights [out, in] and biases [out], in one order."""
        products = [self.qkv, self.out, self.cross.q, self.cross.out, self.cross_padded.q, self.cross_padded.out]
        products += [self.cross_kv, self.up, self.down]
        return [tensor for product in products for tensor in (product.weight, product.bias)]


def check_transformer(transformer: PixArtTransformer2DModel) -> None:
    """Raise ValueError for a transformer with parts that this forward pass lacks, naming all of them."""
    config = transformer.config
    wanted = {
        "norm_type": "ada_norm_single",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "attention_type": "default",
        "norm_eps": 1e-6,
    }
    other = [f"{name} is {config[name]!r}" for name, value in wanted.items() if config[name] != value]
    if transformer.use_additional_conditions or transformer.caption_projection is None:
        other.append("additional conditions or no caption projection")
    if any(type(layer) is not torch.nn.Linear for layer in _products(transformer)):
        other.append("adapters or quantised layers in its blocks")
    if other:
        raise ValueError(f"compile: the fast forward pass does not know this transformer ({'; '.join(other)})")


def _products(transformer: PixArtTransformer2DModel) -> list[torch.nn.Module]:
    """The layers of the blocks whose weights are read from here."""
    layers = []
    for block in transformer.transformer_blocks:
        layers += [block.ff.net[0].proj, block.ff.net[2]]
        for attention in (block.attn1, block.attn2):
            layers += [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
    return layers

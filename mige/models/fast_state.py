"""What a step of the fast DiT reads and, on a GPU, replays.

Letters: B samples of all branches, N patches, M = B x N tokens, L context positions, C channels, H heads, D channels a
head; K blocks.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Inputs:
    """What a step reads, at fixed addresses: a captured step is replayed over whatever they hold."""

    x_BCHW: Tensor  # float32 [samples, 4, h, w], the noisy latents of one branch
    source_BCHW: Tensor  # [B, 4, h, w]
    modulation_K6C: Tensor  # of the current time: shift, scale, gate around attention; the same around the MLP
    end_2C: Tensor  # of the current time: shift and scale before the last projection
    kv_K2BLHD: Tensor  # keys and values of the context, of every block; D is `padded_head_dim` if any is padding
    position_NC: Tensor
    change_2MC: Tensor | None  # what the middle blocks added last time, and the time before; None: never reused
    extrapolation: Tensor  # float32 [1], how far past the last time, in distances of the last two


@dataclass(frozen=True)
class Recording:
    """A captured step: replaying it fills `eps`, [B, 4, h, w]."""

    graph: torch.cuda.CUDAGraph
    eps: Tensor


@dataclass(frozen=True)
class Step:
    """A step of one shape: its inputs and, on a GPU, its recordings (True: the one that reuses the middle blocks)."""

    inputs: Inputs
    recordings: dict[bool, Recording] = field(default_factory=dict)


def addresses(modules: Iterable[nn.Module]) -> tuple[tuple[int, torch.dtype, torch.device], ...]:
    """Where the first parameter of each module is: elsewhere after `.to`, loading, adapters or quantising.

    A recording reads weights where they were when it was made.
    """
    firsts = (next(module.parameters()) for module in modules)
    return tuple((first.data_ptr(), first.dtype, first.device) for first in firsts)

"""Gradients clipped to a norm; where the optimiser can, while it reads them, so that they are not written once more."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from mige.training.adamw import StochasticAdamW


def clip_gradients(
    accelerator: Accelerator,
    optimizers: Sequence[torch.optim.Optimizer],
    trained: Sequence[nn.Parameter],
    max_norm: float,
) -> Tensor | None:
    """Scale all gradients alike so that their norm is at most `max_norm`; returns the norm before, float32 [].

    With `StochasticAdamW` alone the gradients stay as they are: its next step scales them. What shards clips by itself
    (DeepSpeed: None before its first step).
    """
    inner = [getattr(one, "optimizer", one) for one in optimizers]  # accelerate wraps them
    if len(inner) != 1 or not isinstance(inner[0], StochasticAdamW):
        return accelerator.clip_grad_norm_(trained, max_norm)
    norm = gradient_norm(trained)
    inner[0].scale = clip_factor(norm, max_norm)
    return norm


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of all gradients together, float32 [], of sharded ones over all processes.

    Summed in float32, where torch's sums of bfloat16 keep 8 bits.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole, shards = (
        [g for g in gradients if not isinstance(g, DTensor)],
        [g for g in gradients if isinstance(g, DTensor)],
    )
    norms = [_norm(whole)] if whole else []
    if shards:
        square = _norm([g.to_local() for g in shards]).square()
        dist.all_reduce(square, group=shards[0].device_mesh.get_group())
        norms.append(square.sqrt())
    return torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of that norm are multiplied with, float32 [], as `torch.nn.utils.clip_grad_norm_` does."""
    return (max_norm / (norm + 1e-6)).clamp(max=1)

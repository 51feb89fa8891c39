"""AdamW in three precisions, and its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from mige.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, samples_a_step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, then constant; scaled with the square root of the samples a step."""
    full = config.learning_rate * math.sqrt(samples_a_step / config.lr_batch)
    return full * min(1.0, (step + 1) / config.warmup) if config.warmup else full


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with decay on every parameter, norms and biases too, as the released weights were trained.

    "adamw" keeps its moments in the weights' dtype. On bfloat16 weights its updates, a millionth of the value, would
    mostly round to nothing; "adamw_bf16" rounds them stochastically (torchao). "adamw_8bit" stores moments in 8 bits
    (bitsandbytes). Raises ImportError naming the extra to install.
    """
    parameters = [p for p in parameters if p.requires_grad]
    options = dict(lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=all(p.is_cuda for p in parameters), **options)
    if config.optimizer == "adamw_bf16":
        from torchao.optim import _AdamW  # extra: pip install 'mige[torchao]'

        return _AdamW(parameters, bf16_stochastic_round=True, **options)
    from bitsandbytes.optim import AdamW8bit  # extra: pip install 'mige[bitsandbytes]'

    return AdamW8bit(parameters, **options)

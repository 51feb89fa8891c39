"""AdamW in three precisions, Muon, and their learning rate."""

import dataclasses
import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import nn

from mige.config import ConfigError, TrainConfig
from mige.models.mige import MIGEModel
from mige.training.adamw import StochasticAdamW
from mige.training.muon import BatchedMuon, muon_groups


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError, naming the extra to install, for an optimiser whose library is not there."""
    if config.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.optimizer is 'adamw_8bit', which bitsandbytes brings: pip install 'mige[bitsandbytes]', or set "
            "train.optimizer=adamw"
        )


def learning_rate(config: TrainConfig, step: int, global_batch_size: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up, constant, linear cool-down; x the root of the samples a step."""
    full = config.learning_rate * math.sqrt(global_batch_size / config.lr_reference_batch)
    rising = (step + 1) / config.warmup if config.warmup else 1.0
    falling = (config.steps - step) / config.cooldown if config.cooldown else 1.0
    return full * min(1.0, rising, falling)


def build_optimizers(
    config: TrainConfig, model: MIGEModel, device: torch.device, sharded: bool = False
) -> list[torch.optim.Optimizer]:
    """What `config.optimizer` names, over all trained values; `device`: where they will be when it steps.
    `sharded`: they will be FSDP2's.

    "muon" takes the matrices of the repeated blocks and leaves the rest to AdamW; the others are one optimiser.
    """
    if config.optimizer != "muon":
        return [build_optimizer(config, model.parameters(), device, sharded)]
    groups = muon_groups(model.blocks())
    matrices = {id(p) for group in groups for p in group["params"]}
    others = [p for p in model.parameters() if id(p) not in matrices]
    muon = BatchedMuon(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    return [muon, build_optimizer(dataclasses.replace(config, optimizer="adamw"), others, device)]


def build_optimizer(
    config: TrainConfig, parameters: Iterable[nn.Parameter], device: torch.device, sharded: bool = False
) -> torch.optim.Optimizer:
    """AdamW with decay on every parameter, norms and biases too, as the released weights were trained.

    On bfloat16 parameters the updates of "adamw", a millionth of the value, would mostly round to nothing: there it
    rounds parameters and moments stochastically. On shards of FSDP2 the same optimiser, in float32 too, updates what
    each process has by one kernel, where torch's asks for every tensor how it is sharded. "adamw_8bit" stores moments
    in 8 bits (bitsandbytes; `check_optimizer`).
    """
    parameters = [p for p in parameters if p.requires_grad]
    options = dict(lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)
    half = any(p.dtype is torch.bfloat16 for p in parameters)
    if config.optimizer == "adamw" and (half or sharded):
        return StochasticAdamW(parameters, seed=config.seed, **options)
    if config.optimizer == "adamw":
        # The parameters may still be on the CPU: DeepSpeed moves them, and unfused steps of its flat ones take 10 GB.
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **options)
    from bitsandbytes.optim import AdamW8bit  # an extra

    return AdamW8bit(parameters, **options)

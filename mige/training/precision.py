"""In which precision a run trains: chosen once, by the memory of the smallest card, and kept when it is resumed.

`train.precision`:

* float32: parameters, moments and products.
* mixed: parameters, gradients and moments in float32, products in bfloat16 (autocast).
* bfloat16: parameters, gradients and moments in bfloat16, updated with stochastic rounding (mige/training/adamw.py);
  with `lora` the frozen base only, as adapters are float32 and computed under autocast.
* auto: float32 on a CPU; with `lora` bfloat16; else mixed where it fits the smallest card, and bfloat16 where not. The
  number of cards does not enter, so that a run may be resumed on more or fewer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed as dist

from mige.config import Config, ConfigError, TrainConfig
from mige.models.build import build_parts
from mige.models.mige import MODEL_PREFIXES, MIGEModel

GIB = 2**30
ROOM = 0.75
"""Share of a card that parameters, gradients and moments may take: the rest is for activations and communication."""

BLOCKS = ("transformer", "text_encoder", "image_encoder", "qformer")


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    trained: int
    frozen: int


def resolve(config: Config, saved: Mapping[str, Any] | None, state: PartialState, sharding: str) -> tuple[Config, str]:
    """The config with nothing left to choose, and a line that says what was chosen.

    Args:
        saved: what a checkpoint that is resumed says must stay; its precision rules.
        sharding: none, FSDP2 or ZeRO-2.

    Raises ConfigError, naming the override, where too little memory is there.
    """
    settings, why = config.train, "as set"
    card = card_memory(state)
    sizes = None if card is None else count_parameters(config)
    shards = state.num_processes if sharding != "none" else 1
    if settings.precision == "auto":
        if saved is not None:
            chosen, why = saved_precision(saved), "as the checkpoint"
        else:
            chosen = choose(settings, sizes, card, sharding)
            why = "on a CPU" if card is None else f"for cards of {card / GIB:.0f} GiB; train.precision overrides"
        settings = replace(settings, precision=chosen)
    if sizes is not None:
        check_memory(settings, sizes, card, shards)
    if settings.compile is None:
        settings = replace(settings, compile=[] if card is None else list(BLOCKS))
    wrapper = {"none": "one process" if state.num_processes == 1 else "DDP"}.get(sharding, sharding)
    blocks = "compiled" if settings.compile else "not compiled"
    line = f"precision {settings.precision} ({why}), {wrapper} on {state.num_processes} x {state.device.type}, {blocks}"
    return replace(config, train=settings), line


def choose(settings: TrainConfig, sizes: Sizes | None, card: int | None, sharding: str) -> str:
    """What `auto` stands for on cards of that many bytes; None: a CPU."""
    if card is None:
        return "float32"
    if settings.trainable == "lora":
        return "bfloat16"
    if sharding != "none" or settings.optimizer != "adamw":  # these take float32 parameters
        return "mixed"
    return "mixed" if needed_bytes(settings, sizes, "mixed") <= ROOM * card else "bfloat16"


def check_memory(settings: TrainConfig, sizes: Sizes, card: int, shards: int) -> None:
    """Raise ConfigError where parameters, gradients and moments alone do not fit a card."""
    needed = needed_bytes(settings, sizes, settings.precision) / shards
    if needed <= card:
        return
    hints = []
    bfloat16 = needed_bytes(settings, sizes, "bfloat16") / shards
    if settings.precision != "bfloat16" and settings.optimizer == "adamw" and bfloat16 <= ROOM * card:
        hints.append("train.precision=bfloat16")
    if settings.trainable in ("full", "all"):
        hints.append("train.trainable=lora")
    if settings.trainable != "lora":
        hints.append("LAUNCH=fsdp2 on more cards")
    raise ConfigError(
        f"train.precision is {settings.precision!r} and train.trainable {settings.trainable!r}: parameters, gradients "
        f"and moments take {needed / GIB:.3g} GiB a card, and the smallest card has {card / GIB:.3g}; "
        f"set {' or '.join(hints)}"
    )


def needed_bytes(settings: TrainConfig, sizes: Sizes, precision: str) -> int:
    """Of parameters, gradients, moments and averages, all on one card; without activations."""
    moments = {"adamw": 8, "adamw_8bit": 2, "muon": 4}[settings.optimizer]
    average = 0 if settings.ema is None else 4
    if precision == "bfloat16" and settings.trainable != "lora":
        return (2 + 2 + 4 + average) * sizes.trained + 2 * sizes.frozen
    copies = 2 if precision == "mixed" else 0  # autocast keeps the matrices in bfloat16 for the backward pass
    frozen = 2 if precision == "bfloat16" else 4 + copies
    return (4 + 4 + copies + moments + average) * sizes.trained + frozen * sizes.frozen


def count_parameters(config: Config) -> Sizes:
    """Of the model that the config describes; adapters, a thousandth of it, are left out."""
    model = MIGEModel(**build_parts(config.model, device="meta", only=tuple(MODEL_PREFIXES)))
    model.freeze(config.train.trainable)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Sizes(trained, sum(p.numel() for p in model.parameters()) - trained)


def card_memory(state: PartialState) -> int | None:
    """Bytes of the smallest card of all processes; None on CPUs."""
    if state.device.type != "cuda":
        return None
    own = torch.tensor(torch.cuda.get_device_properties(state.device).total_memory, device=state.device)
    if state.num_processes > 1:
        dist.all_reduce(own, dist.ReduceOp.MIN)
    return int(own)


def saved_precision(saved: Mapping[str, Any]) -> str:
    """Of a checkpoint, from what it says must stay."""
    if saved.get("param_dtype") == "bfloat16":
        return "bfloat16"
    return "mixed" if saved.get("mixed_precision") == "bf16" else "float32"

"""Adapters that are trained: on which layers, from fresh or from a file, and written by part."""

from pathlib import Path

import torch
from torch import nn

from mige.checkpoints.lora import ADAPTER, ATTENTION, add_lora, fingerprint, save_lora, scales_of
from mige.checkpoints.lora_state import Lora, read_lora
from mige.config import TrainConfig
from mige.models.mige import MIGEModel
from mige.training.errors import TrainingError

TARGETS = {
    "dit_attention": ("transformer", ATTENTION),
    "dit_mlp": ("transformer", ("ff.net.0.proj", "ff.net.2")),
    "t5": ("text_encoder", ("q", "k", "v", "o", "wi_0", "wi_1", "wo")),
    "qformer": ("qformer", ("query", "key", "value", "dense")),
    # Not the output of its attention, whose class multiplies by the bare weight.
    "fusion": ("fusion", ("q_proj", "k_proj.0", "k_proj.2", "v_proj.0", "v_proj.2", "out", "text_proj")),
}
"""`train.lora_targets`: the part of each, and the ends of its layers' paths."""


def adapted(settings: TrainConfig) -> dict[str, list[str]]:
    """The parts that get adapters, each with the ends of its layers' paths."""
    found: dict[str, list[str]] = {}
    for name in settings.lora_targets if settings.trainable == "lora" else ():
        part, layers = TARGETS[name]
        found.setdefault(part, []).extend(layers)
    return found


def add_adapters(settings: TrainConfig, model: MIGEModel) -> None:
    """Put adapters on the layers of `train.lora_targets`, fresh or those of `train.lora`; they alone train.

    They are float32 whatever dtype lies below them, as bfloat16 would round their updates away. Raises TrainingError
    where images take no positions but their adapters are asked for, and for adapters of another rank, alpha or layers;
    CheckpointError for those that are not of this model.
    """
    parts, chosen = parts_of(model), adapted(settings)
    if model.encoder.fusion.config.num_queries == 0 and chosen.keys() & {"qformer", "fusion"}:
        raise TrainingError(
            f"train.lora_targets is {list(settings.lora_targets)}, but the images of this model take no positions: "
            "nothing reads its Q-Former and fusion; leave them out"
        )
    given = None if settings.lora is None else read_lora(parts, Path(settings.lora))
    for name, layers in chosen.items():
        add_lora(parts[name], settings.lora_rank, settings.lora_alpha, layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if given is not None:
        _continue(settings, {name: parts[name] for name in chosen}, given)


def save_adapters(model: MIGEModel, folder: Path) -> None:
    """The DiT's adapters as PEFT writes them, and in a folder below of its name those of each other part."""
    base = fingerprint(model.transformer)
    for name, part in parts_of(model).items():
        if scales_of(part):
            save_lora(part, folder if name == "transformer" else folder / name, base)


def parts_of(model: MIGEModel) -> dict[str, nn.Module]:
    """The parts that adapters may belong to, by their names in the checkpoint folder."""
    encoder = model.encoder
    own = {"text_encoder": encoder.text_encoder, "qformer": encoder.qformer, "fusion": encoder.fusion}
    return {"transformer": model.transformer} | own


@torch.no_grad()
def _continue(settings: TrainConfig, parts: dict[str, nn.Module], given: Lora) -> None:
    """Fill fresh adapters with those of a file (`Lora`), if they are of the same layers, rank and alpha."""
    layers = {f"{name}.{layer}": parts[name].get_submodule(layer) for name in parts for layer in scales_of(parts[name])}
    if layers.keys() != given.scale.keys():
        other = sorted(layers.keys() ^ given.scale.keys())
        there = "the file" if other[0] in given.scale else "train.lora_targets"
        raise TrainingError(f"train.lora={settings.lora}: {other[0]} has adapters in {there} alone: make them agree")
    for at, layer in layers.items():
        rank, alpha = len(given.low[at]), given.scale[at] * len(given.low[at])
        if (rank, given.scale[at]) != (settings.lora_rank, layer.scaling[ADAPTER]):
            raise TrainingError(f"train.lora={settings.lora}: {at} has rank {rank} and alpha {alpha:g}, expected the "
                                f"run's: set train.lora_rank={rank} train.lora_alpha={alpha:g}")  # fmt: skip
        layer.lora_A[ADAPTER].weight.copy_(given.low[at])
        layer.lora_B[ADAPTER].weight.copy_(given.up[at])

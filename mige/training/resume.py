"""What a run may change when it is resumed, and what it may not.

Everything that decides which sample comes when, what is done with it, or what the optimiser's state means must stay. It
is written into each checkpoint under the names below, which do not follow renamings in the code or the config.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mige.config import Config, ModelConfig, TrainConfig
from mige.data.mapped_records import MappedRecords
from mige.data.order import ORDER, exact
from mige.data.records import Record
from mige.data.shape_order import SHAPE_ORDER
from mige.inference.pipeline import MIGEPipeline
from mige.training.errors import TrainingError

ANY = "any"
"""The layout that any number of processes reads, sharded or not."""

_LATER = ("frozen",)
"""Facts that checkpoints of before do not tell."""


def resume_invariants(
    config: Config, dataset: Dataset, *, global_batch_size: int, sharding: str, processes: int
) -> dict[str, Any]:
    """Name -> value in JSON of all that must stay.

    Args:
        sharding: the layout of the saved state: ANY, ZeRO-2, or in checkpoints of version 0.1 none or FSDP2.
    """
    data, train = config.data, config.train
    order = SHAPE_ORDER if data.shapes else ORDER
    facts = {
        "seed": train.seed,
        "global_batch_size": global_batch_size,
        "epoch_samples": len(dataset),
        "order": order if data.sets else None,  # the miniature world's cases come as they are numbered
        "world": [[kind, float(weight)] for kind, weight in data.world.items()],
        "world_name": None if data.world_name == "first" else data.world_name,  # as before there were two
        "image_size": data.size,
        "shapes": [list(grid) for grid in data.shapes] or None,  # as before there were any
        "shape_block": config.shape_block if data.shapes else None,
        "features": data.features is not None,
        "drop_text": float(data.drop_text),
        "drop_source": float(data.drop_source),
        "drop_both": float(data.drop_both),
        "noise_levels": train.noise_levels,
        "snr_gamma": train.snr_gamma,
        "snr_power": float(train.snr_power),
        "optimizer": "adamw_bf16" if _stochastic(train) else train.optimizer,
        "betas": [float(beta) for beta in train.betas],
        "eps": float(train.eps),
        "weight_decay": float(train.weight_decay),
        "ema": train.ema,
        "param_dtype": train.param_dtype,
        "mixed_precision": train.mixed_precision,
        "trainable": train.trainable,
        "lora_rank": train.lora_rank if train.trainable == "lora" else None,
        **_adapters(train),
        "sharding": sharding,
        **_architecture(config.model),
    }
    for number, (records, one) in enumerate(zip(_sets(dataset), data.sets, strict=False)):
        facts[f"set_{number}"] = {
            "file": str(one["file"]).replace("\\", "/").rsplit("/", 1)[-1],
            "records": len(records),
            "weight": float(exact(one["weight"])),
            "digest": _digest(records, Path(one.get("root") or Path(one["file"]).parent)),
        }
        if dataset.shaped is not None:  # which shape a record has follows from its image
            facts[f"set_{number}"]["shapes"] = hashlib.sha256(dataset.shaped.of_sets[number]).hexdigest()[:16]
    facts["sets"] = len(data.sets)
    if config.distillation is not None:
        facts["distillation"] = dataclasses.asdict(config.distillation)
    if sharding == "ZeRO-2":
        facts["processes"] = processes
    return facts


def _adapters(train: TrainConfig) -> dict[str, Any]:
    """What adapters have beside a rank; None: as before it could be chosen."""
    alpha, targets = train.lora_alpha, sorted(set(train.lora_targets))
    usual = train.trainable != "lora" or targets == ["dit_attention"]
    own = train.trainable == "lora" and alpha not in (None, train.lora_rank)
    return {"lora_alpha": float(alpha) if own else None, "lora_targets": None if usual else targets}


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """The sizes that the saved parameters have."""
    return {
        "dit_layers": model.transformer["num_layers"],
        "dit_heads": model.transformer["num_attention_heads"],
        "dit_head_size": model.transformer["attention_head_dim"],
        "text_layers": model.text_encoder.get("num_layers"),
        "text_width": model.text_encoder["d_model"],
        "vision_layers": model.image_encoder.get("num_hidden_layers"),
        "vision_width": model.image_encoder["hidden_size"],
        "qformer_layers": model.qformer.get("num_hidden_layers"),
        "qformer_width": model.qformer["hidden_size"],
        "queries": model.fusion.get("num_queries"),
        "vae_features": model.fusion.get("vae_features", True),
    }


def _stochastic(train: TrainConfig) -> bool:
    return train.optimizer == "adamw" and train.precision == "bfloat16" and train.trainable != "lora"


def check_invariants(saved: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """Raise TrainingError naming every fact that differs, with both values."""
    names = [name for name in (saved | now) if saved.get(name) != now.get(name)]
    names = [name for name in names if name in saved or name not in _LATER]
    if names:
        differing = "; ".join(f"{name}: {saved.get(name)} there, {now.get(name)} now" for name in names)
        raise TrainingError(
            f"{checkpoint} cannot be resumed as this run is set: {differing}. Set these back (the global batch is "
            "batch_size x gradient_accumulation_steps x processes), or start a new run from its model/ folder"
        )


def _sets(dataset: Dataset) -> list[Sequence[Record]]:
    mixture = getattr(dataset, "mixture", None)  # the miniature world's is weights of kinds
    return list(getattr(mixture, "sets", ()))


def _digest(records: Sequence[Record], root: Path) -> str:
    """Of what is trained on, wherever the set lies: ids, tasks, instructions, images by their paths below the root."""
    if isinstance(records, MappedRecords):
        return records.remembered(f"resume digest below {root}", lambda all_of_them: _digest_of(all_of_them, root))
    return _digest_of(records, root)


def _digest_of(records: Iterable[Record], root: Path) -> str:
    found = hashlib.sha256()
    for record in records:
        images = [_place(path, root) for path in (*record.references, record.target) if path is not None]
        source = record.references.index(record.source) if record.source in record.references else None
        row = [record.id, str(record.task), record.prompt, record.edit_type, source, images]
        found.update(repr(row).encode())
    return found.hexdigest()[:16]


def _place(path: Path, root: Path) -> str:
    """A path below the root; of one elsewhere, which may be moved, its last folder and its name."""
    return str(path.relative_to(root)) if path.is_relative_to(root) else "/".join(path.parts[-2:])


def frozen_digest(pipeline: MIGEPipeline, trainable: str) -> str:
    """Of what is used and not trained, a part of every tensor: frozen parameters, the VAE, and the vocabulary.

    Left out is the vision tower, whose dtype depends on the device.
    """
    model = pipeline.model
    model.freeze(trainable)
    tower = set(model.encoder.image_encoder.parameters())
    used = [(name, p) for name, p in model.named_parameters() if not p.requires_grad and p not in tower]
    found = hashlib.sha256()
    for name, parameter in [*used, *pipeline.vae.named_parameters()]:
        part = parameter.detach().flatten()[:256].to("cpu", torch.bfloat16).view(torch.uint8)
        found.update(f"{name} {list(parameter.shape)}".encode() + part.numpy().tobytes())
    found.update(repr(sorted(pipeline.tokenizer.get_vocab().items())).encode())
    return found.hexdigest()[:16]

"""What a training starts from, and what of it cannot be trained as the config says."""

import torch
from transformers import AutoTokenizer

from mige.config import Config, ConfigError, TrainConfig
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.mige import MODEL_PREFIXES
from mige.training.errors import TrainingError


def load_pretrained(config: Config, device: torch.device) -> MIGEPipeline:
    """The pipeline that training starts from: a checkpoint folder, or fresh parameters from the seed.

    Parts are in the dtype of `train.precision`, the frozen vision tower on a GPU in the dtype it was trained with, the
    VAE in float32.
    """
    settings = config.train
    dtype = getattr(torch, settings.param_dtype)
    if settings.pretrained is not None:
        pipeline = MIGEPipeline.from_pretrained(settings.pretrained, dtype=dtype)
        check_sizes(config, pipeline)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            parts = build_parts(config.model, dtype=dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
        except (OSError, ValueError) as error:
            raise ConfigError(f"train.tokenizer={settings.tokenizer!r} cannot be read: {error}") from error
        pipeline = MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M())
    if device.type != "cpu" and settings.trainable != "all":
        set_product_dtype(pipeline.image_encoder, getattr(torch, pipeline.fusion.config.vision_dtype))
    return pipeline


def check_sizes(config: Config, pipeline: MIGEPipeline) -> None:
    """Raise ConfigError if the config describes another model than the one training starts from.

    The VAE is left out: it is not trained, and its scale factor is a fact of its weights.
    """
    for part in MODEL_PREFIXES:
        there = getattr(pipeline, part).config
        for key, value in getattr(config.model, part).items():
            found = getattr(there, key, None)
            if found != value and (type(value) is int or part == "fusion"):  # other facts the libraries may rewrite
                raise ConfigError(
                    f"model.{part}.{key} is {value!r}, but {config.train.pretrained} has {found!r}: make them equal, "
                    "or train fresh weights with train.pretrained=None"
                )


def check_shardable(settings: TrainConfig, by: str) -> None:
    """Raise TrainingError for what FSDP2 or ZeRO-2 (`by`) cannot split over processes."""
    if by == "FSDP2" and settings.trainable == "lora":
        raise TrainingError("train.trainable is 'lora': its few weights are not sharded; launch without FSDP2 (DDP)")
    if settings.optimizer != "adamw" or (by != "FSDP2" and settings.param_dtype != "float32"):
        raise TrainingError(
            f"train.optimizer is {settings.optimizer!r} on {settings.param_dtype} parameters; {by} shards 'adamw'"
            f"{'' if by == 'FSDP2' else ' on float32 parameters'}: set train.optimizer=adamw train.precision=mixed, or "
            "launch without it (LAUNCH=ddp)"
        )

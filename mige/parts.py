"""The parts of a checkpoint folder, built from a config: library classes, with their arguments checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    PretrainedConfig,
    T5Config,
    T5EncoderModel,
)

from mige.config import ConfigError, ModelConfig
from mige.encoder import prepare_vision_tower
from mige.fusion import MIGEFusion

_BUILDERS = {
    "transformer": lambda sizes: _call(PixArtTransformer2DModel, sizes, "transformer"),
    "text_encoder": lambda sizes: T5EncoderModel(_library_config(T5Config, sizes, "text_encoder")),
    "image_encoder": lambda sizes: Blip2VisionModel(_library_config(Blip2VisionConfig, sizes, "image_encoder")),
    "qformer": lambda sizes: Blip2QFormerModel(_library_config(Blip2QFormerConfig, sizes, "qformer")),
    "fusion": lambda sizes: _call(MIGEFusion, sizes, "fusion"),
    "vae": lambda sizes: _call(AutoencoderKL, sizes, "vae").float(),
}
PARTS = tuple(_BUILDERS)
"""Names of the neural parts, as in the checkpoint folder."""


def build_parts(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    only: Sequence[str] = PARTS,
) -> dict[str, nn.Module]:
    """The neural parts with fresh weights, keyed by their names in the checkpoint folder, in evaluation mode.

    On the "meta" device they are shapes only (non-persistent buffers included: don't run them). The VAE is float32
    whatever `dtype`. Raises ConfigError for an argument a library class does not know.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = {name: _BUILDERS[name](getattr(config, name)).eval() for name in only}
    finally:
        torch.set_default_dtype(default)
    if "image_encoder" in parts:
        prepare_vision_tower(parts["image_encoder"])
    return parts


def _call(cls: type, arguments: Mapping[str, Any], section: str) -> nn.Module:
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"model.{section}: {cls.__name__} refuses its arguments: {error}") from error


def _library_config(cls: type[PretrainedConfig], arguments: Mapping[str, Any], section: str) -> PretrainedConfig:
    """transformers configs swallow unknown keys, so they are compared with the attributes of a default config."""
    unknown = [key for key in arguments if not hasattr(cls(), key)]
    if unknown:
        raise ConfigError(f"model.{section}: {cls.__name__} knows no key(s) {unknown}")
    return cls(**arguments)

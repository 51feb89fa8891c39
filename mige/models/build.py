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
from mige.models.encoder import prepare_vision_tower
from mige.models.fusion import MIGEFusion

_BUILDERS = {
    "transformer": lambda sizes: PixArtTransformer2DModel(**sizes),
    "text_encoder": lambda sizes: T5EncoderModel(_library_config(T5Config, sizes)),
    "image_encoder": lambda sizes: Blip2VisionModel(_library_config(Blip2VisionConfig, sizes)),
    "qformer": lambda sizes: Blip2QFormerModel(_library_config(Blip2QFormerConfig, sizes)),
    "fusion": lambda sizes: MIGEFusion(**sizes),
    "vae": lambda sizes: AutoencoderKL(**sizes).float(),
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
    whatever `dtype`. Raises ConfigError for an argument a library class does not know or accept.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            parts = {name: _build(name, getattr(config, name)) for name in only}
    finally:
        torch.set_default_dtype(default)
    if "image_encoder" in parts:
        prepare_vision_tower(parts["image_encoder"])
    return parts


def _build(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    try:
        return _BUILDERS[name](sizes).eval()
    except Exception as error:  # the libraries raise anything, from AssertionError to NotImplementedError
        raise ConfigError(f"model.{name}: its class refuses these arguments: {error}") from error


def _library_config(cls: type[PretrainedConfig], arguments: Mapping[str, Any]) -> PretrainedConfig:
    """transformers configs swallow unknown keys, so they are compared with the attributes of a default config."""
    unknown = [key for key in arguments if not hasattr(cls(), key)]
    if unknown:
        raise TypeError(f"{cls.__name__} knows no key(s) {unknown}")
    return cls(**arguments)

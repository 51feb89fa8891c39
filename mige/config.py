"""Configuration: Python files with `_base_` inheritance, read into frozen sections; an unknown key fails.

A config file holds data only. `load("configs/mige_512.py", ["model.transformer.num_layers=2"])`.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmengine


class ConfigError(ValueError):
    """A config with an unknown, missing or contradictory key; the message names it."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the parts, as arguments of their library classes. The keys are checked when the parts are built."""

    transformer: Mapping[str, Any]  # diffusers PixArtTransformer2DModel
    image_encoder: Mapping[str, Any]  # transformers Blip2VisionConfig
    qformer: Mapping[str, Any]  # transformers Blip2QFormerConfig
    text_encoder: Mapping[str, Any]  # transformers T5Config
    fusion: Mapping[str, Any]  # mige MIGEFusion
    vae: Mapping[str, Any]  # diffusers AutoencoderKL

    def __post_init__(self):
        dit, vision, qformer, fusion = self.transformer, self.image_encoder, self.qformer, self.fusion
        width = dit["num_attention_heads"] * dit["attention_head_dim"]
        latent = self.vae["latent_channels"]
        _agree("transformer.in_channels", dit["in_channels"], "2 x vae.latent_channels", 2 * latent)
        _agree("transformer.out_channels", dit["out_channels"], "2 x vae.latent_channels", 2 * latent)
        _agree("transformer.cross_attention_dim", dit["cross_attention_dim"], "heads x head size", width)
        _agree("fusion.patch_width", fusion["patch_width"], "the transformer's width", width)
        _agree("fusion.width", fusion["width"], "qformer.hidden_size", qformer["hidden_size"])
        _agree("fusion.text_width", fusion["text_width"], "text_encoder.d_model", self.text_encoder["d_model"])
        _agree("caption_channels", dit["caption_channels"], "text_encoder.d_model", self.text_encoder["d_model"])
        _agree("qformer.encoder_hidden_size", qformer["encoder_hidden_size"], "image width", vision["hidden_size"])


@dataclass(frozen=True)
class Config:
    """A whole config file."""

    model: ModelConfig
    origin: str = field(default="", compare=False)  # the file, for messages


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `section.key=value` overrides (values in Python syntax, else taken as text).

    Raises ConfigError for a missing file, an unknown section or key, or parts whose sizes don't fit together.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file")
    data = mmengine.Config.fromfile(str(path)).to_dict()
    for override in overrides:
        _override(data, override, str(path))
    known = {f.name for f in dataclasses.fields(Config)} - {"origin"}
    _refuse_unknown(data.keys() - known, str(path), known)
    _refuse_missing(known - data.keys(), str(path))
    return Config(model=_section(ModelConfig, data["model"], f"{path}: model"), origin=str(path))


def _section(cls: type, data: Any, where: str):
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a dict, got {type(data).__name__}")
    _refuse_unknown(data.keys() - known, where, known)
    _refuse_missing(known - data.keys(), where)
    return cls(**data)


def _refuse_unknown(unknown: set[str], where: str, known: set[str]) -> None:
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {sorted(unknown)}; known are {sorted(known)}")


def _refuse_missing(missing: set[str], where: str) -> None:
    if missing:
        raise ConfigError(f"{where}: missing key(s) {sorted(missing)}")


def _override(data: dict, override: str, where: str) -> None:
    """Set `a.b.c=value` in nested dicts; only a key that is there can be overridden."""
    path, separator, text = override.partition("=")
    *parents, last = path.split(".")
    for key in parents:
        data = data.get(key) if isinstance(data, dict) else None
    if not separator or not isinstance(data, dict) or last not in data:
        raise ConfigError(f"{where}: cannot override {override!r}: expected an existing section.key=value")
    try:
        data[last] = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # not Python syntax: plain text, as in mode=full
        data[last] = text


def _agree(name: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise ConfigError(f"model: {name} is {got}, but {other} is {expected}: make them equal")

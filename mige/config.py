"""Configuration: Python files with `_base_` inheritance, read into frozen sections; an unknown key fails.

A config file holds data only. `load("configs/mige_512.py", ["model.transformer.num_layers=2"])`.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
        for section in dataclasses.fields(self):
            value = getattr(self, section.name)
            if not isinstance(value, Mapping):
                raise ConfigError(f"model.{section.name}: expected a dict, got {value!r}")
        try:
            self._check_widths()
        except KeyError as error:
            raise ConfigError(f"model: a section lacks the key {error}") from error

    def _check_widths(self) -> None:
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
class DataConfig:
    """What is trained on."""

    sets: Sequence[Mapping[str, Any]]  # file, weight (views of each record an epoch), and if need be root, task
    world: Mapping[str, float]  # in place of sets: kinds of the miniature world's tasks and their weights
    size: int  # side of the square pictures, px
    features: str | None  # store of pre-extracted moments; None: the VAE encodes in every step
    skip_bad: bool  # train without the bad records, which are logged, instead of refusing the set
    check_pictures: bool  # decode all before the first step; False for a large set that tools/check_data.py has passed
    workers: int  # data-loading processes a GPU
    drop_text: float  # share of samples that lose their text only
    drop_source: float  # ... their source only
    drop_both: float  # ... both

    def __post_init__(self):
        if self.world and (self.sets or self.features is not None):
            raise ConfigError("data.world draws its own pictures: leave data.sets empty and data.features None")
        for number, one in enumerate(self.sets):
            known = {"file", "weight", "root", "task"}
            _refuse_unknown(one.keys() - known, f"data.sets[{number}]", known)
            _refuse_missing({"file", "weight"} - one.keys(), f"data.sets[{number}]")


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    start: str | None  # checkpoint folder to start from; None: fresh weights
    tokenizer: str | None  # tokenizer folder, for fresh weights
    seed: int
    steps: int  # optimiser steps
    batch_size: int  # samples a process and micro-batch
    accumulate: int  # micro-batches a step
    learning_rate: float  # at `lr_batch` samples a step
    lr_batch: int  # the rate is scaled by sqrt(samples a step / lr_batch)
    warmup: int  # steps of linear warm-up, then constant
    cooldown: int  # last steps, in which the rate falls linearly to zero; 0: constant to the end
    weight_decay: float  # on every trained value
    betas: Sequence[float]
    eps: float
    clip: float  # largest gradient norm
    optimizer: str  # adamw; adamw_bf16 (stochastic rounding); adamw_8bit (bitsandbytes); muon (and adamw)
    weights: str  # dtype of the trained weights: float32, bfloat16
    trainable: str  # full (all but the vision tower); text_encoder_frozen; lora (adapters in the DiT); scratch (all)
    noise_levels: int  # of every sample a step: the encoder's work is shared by them
    snr_gamma: float | None  # min-SNR weighting of the loss (5 in its paper); None: unweighted, as the released model
    snr_power: float  # the loss weighs SNR ** -snr_power where SNR < 1; 0: unweighted, as the released model
    lora_rank: int
    gradient_checkpointing: Sequence[str]  # parts that recompute activations: transformer, text_encoder
    compile: list[str]  # parts whose blocks torch.compile takes: transformer, text_encoder, image_encoder, qformer; vae
    ema: float | None  # decay of averaged weights, which checkpoints then hold for inference
    log_every: int  # steps
    checkpoint_every: int  # steps
    keep_checkpoints: int  # the newest N stay
    sample_every: int  # steps; 0: never
    sample_records: Sequence[str]  # record files, sampled at these steps
    sample_steps: int | None  # solver steps for them; None: the official ones
    trackers: Sequence[str]  # tensorboard, wandb, ...

    def __post_init__(self):
        _one_of("train.optimizer", self.optimizer, ("adamw", "adamw_bf16", "adamw_8bit", "muon"))
        _one_of("train.weights", self.weights, ("float32", "bfloat16"))
        _one_of("train.trainable", self.trainable, ("full", "text_encoder_frozen", "lora", "scratch"))
        for part in self.gradient_checkpointing:
            _one_of("train.gradient_checkpointing", part, ("transformer", "text_encoder"))
        for part in self.compile:
            _one_of("train.compile", part, ("transformer", "text_encoder", "image_encoder", "qformer", "vae"))
        at_least_one = ("steps", "batch_size", "accumulate", "noise_levels", "log_every", "checkpoint_every")
        for name in (*at_least_one, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} is {getattr(self, name)}, expected at least 1")
        if self.start is None and self.tokenizer is None:
            raise ConfigError("train.start is None: fresh weights need train.tokenizer, a tokenizer folder")
        if self.start is None and self.trainable == "lora":
            raise ConfigError("train.trainable is 'lora', but train.start is None: adapters need trained weights below")
        if self.optimizer == "adamw_bf16" and self.weights != "bfloat16":
            raise ConfigError("train.optimizer is 'adamw_bf16', but train.weights is not 'bfloat16'")
        if self.trainable == "lora" and self.ema is not None:
            raise ConfigError("train.ema averages whole models; set it to None for 'lora'")
        if self.sample_every and not self.sample_records:
            raise ConfigError("train.sample_every is set, but train.sample_records names no file")


@dataclass(frozen=True)
class Config:
    """A whole config file."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    def dump(self) -> dict[str, Any]:
        """Plain dicts, for JSON."""
        return dataclasses.asdict(self)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `section.key=value` overrides (values in Python syntax, else taken as text).

    Raises ConfigError for a missing file, an unknown section or key, or parts whose sizes don't fit together.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        data = mmengine.Config.fromfile(str(path)).to_dict()
    except Exception as error:  # a config file is Python, so anything can go wrong in it
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    for override in overrides:
        _override(data, override, str(path))
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    _refuse_unknown(data.keys() - sections.keys(), str(path), sections.keys())
    _refuse_missing(sections.keys() - data.keys(), str(path))
    return Config(**{name: _section(cls, data[name], f"{path}: {name}") for name, cls in sections.items()})


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


def _one_of(name: str, got: str, known: Sequence[str]) -> None:
    if got not in known:
        raise ConfigError(f"{name} is {got!r}, expected one of {', '.join(known)}")


def _agree(name: str, got: int, other: str, expected: int) -> None:
    if got != expected:
        raise ConfigError(f"model: {name} is {got}, but {other} is {expected}: make them equal")

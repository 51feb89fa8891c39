"""Configuration: Python files with `_base_` inheritance, read into frozen sections; an unknown key fails.

A config file holds data only. `load("configs/mige_512.py", ["model.transformer.num_layers=2"])`. Relative paths in it
are taken from the working directory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmengine

from mige.utils.settings import (
    ConfigError,
    agree,
    apply_override,
    at_least,
    check_grids,
    check_type,
    check_types,
    one_of,
    positive,
    positive_fraction,
    refuse_missing,
    refuse_unknown,
    within,
)


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
        agree("transformer.in_channels", dit["in_channels"], "2 x vae.latent_channels", 2 * latent)
        agree("transformer.out_channels", dit["out_channels"], "2 x vae.latent_channels", 2 * latent)
        agree("transformer.cross_attention_dim", dit["cross_attention_dim"], "heads x head size", width)
        agree("fusion.patch_width", fusion["patch_width"], "the transformer's width", width)
        agree("fusion.width", fusion["width"], "qformer.hidden_size", qformer["hidden_size"])
        agree("fusion.text_width", fusion["text_width"], "text_encoder.d_model", self.text_encoder["d_model"])
        agree("caption_channels", dit["caption_channels"], "text_encoder.d_model", self.text_encoder["d_model"])
        agree("qformer.encoder_hidden_size", qformer["encoder_hidden_size"], "image width", vision["hidden_size"])


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    sets: Sequence[Mapping[str, Any]]  # file, weight (views of a record an epoch, also "1/3"), if need be root, task
    world: Mapping[str, float]  # in place of sets: kinds of the miniature world's tasks and their weights
    world_name: str  # which of the miniature worlds: first (128 px) or second (256 px)
    size: int  # side of the square images, px
    shapes: Sequence[Sequence[int]]  # patch grids (rows, columns), one a micro-batch; []: squares of `size` alone
    shape_block: int | None  # samples in a row of one shape, a multiple of train.batch_size; None: train.batch_size
    features: str | None  # store of pre-extracted moments; None: the VAE encodes in every step
    skip_bad: bool  # train without the bad records, which are logged, instead of refusing the set
    check_images: bool  # decode all before the first step; False for a large set that tools/check_data.py has passed
    workers: int  # data-loading processes a GPU
    drop_text: float  # share of samples that lose their text only
    drop_source: float  # ... their source only
    drop_both: float  # ... both

    def __post_init__(self):
        check_types(self, "data")
        for name in ("drop_text", "drop_source", "drop_both"):
            within(f"data.{name}", getattr(self, name), 0, 1)
        within("data.drop_text + drop_source + drop_both", self.drop_text + self.drop_source + self.drop_both, 0, 1)
        at_least("data.size", self.size, 1)
        at_least("data.workers", self.workers, 0)
        one_of("data.world_name", self.world_name, ("first", "second"))
        check_grids("data.shapes", self.shapes)
        if self.shape_block is not None:
            at_least("data.shape_block", self.shape_block, 1)
        for kind, weight in self.world.items():
            positive(f"data.world.{kind}", weight)
        if self.world and self.shapes and self.world_name == "first":
            raise ConfigError("data.shapes is set, but the first world's images are square: leave it empty")
        if self.world and (self.sets or self.features is not None):
            raise ConfigError("data.world draws its own images: leave data.sets empty and data.features None")
        for number, one in enumerate(self.sets):
            known = {"file", "weight", "root", "task"}
            refuse_unknown(one.keys() - known, f"data.sets[{number}]", known)
            refuse_missing({"file", "weight"} - one.keys(), f"data.sets[{number}]")
            positive_fraction(f"data.sets[{number}].weight", one["weight"])
            for key in one.keys() - {"weight"}:
                if one[key] is not None or key == "file":
                    check_type(f"data.sets[{number}].{key}", one[key], str)


_TRAIN_NAMES = {
    "optimizer": ("adamw", "adamw_8bit", "muon"),
    "precision": ("auto", "float32", "mixed", "bfloat16"),
    "trainable": ("full", "text_encoder_frozen", "dit", "lora", "all"),
    "lora_targets": ("dit_attention", "dit_mlp", "t5", "qformer", "fusion"),
    "gradient_checkpointing": ("transformer", "text_encoder"),
    "compile": ("transformer", "text_encoder", "image_encoder", "qformer", "vae"),
}


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained."""

    pretrained: str | None  # checkpoint folder to start from; None: fresh weights
    tokenizer: str | None  # tokenizer folder, for fresh weights
    seed: int
    steps: int  # optimiser steps
    batch_size: int  # samples a process and micro-batch
    gradient_accumulation_steps: int  # micro-batches a step
    learning_rate: float  # at `lr_reference_batch` samples a step
    lr_reference_batch: int  # the rate is scaled by sqrt(samples a step / lr_reference_batch)
    warmup: int  # steps of linear warm-up, then constant
    cooldown: int  # last steps, in which the rate falls linearly to zero; 0: constant to the end
    weight_decay: float  # on every trained value
    betas: Sequence[float]
    eps: float
    max_grad_norm: float  # largest gradient norm
    optimizer: str  # adamw; adamw_8bit (bitsandbytes); muon (and adamw)
    precision: str  # auto; float32; mixed (float32 parameters, bfloat16 products); bfloat16 (stochastic rounding)
    trainable: str  # full (all but the vision tower); text_encoder_frozen; dit; lora (adapters); all
    noise_levels: int  # of every sample a step: the encoder's work is shared by them
    snr_gamma: float | None  # min-SNR weighting of the loss (5 in its paper); None: unweighted, as the released model
    snr_power: float  # the loss weighs SNR ** -snr_power where SNR < 1; 0: unweighted, as the released model
    lora_rank: int
    lora_alpha: float | None  # adapters count lora_alpha / lora_rank; None: the rank, so 1
    lora_targets: Sequence[str]  # what has adapters: dit_attention, dit_mlp, t5, qformer, fusion
    lora: str | None  # adapters to go on from (a folder or file), of this rank, alpha and targets; None: fresh ones
    gradient_checkpointing: Sequence[str]  # parts that recompute activations: transformer, text_encoder
    compile: Sequence[str] | None  # parts whose blocks are compiled, vae; None: all four on a GPU, else nothing
    ema: float | None  # decay of averaged weights, which checkpoints then hold for inference
    log_every: int  # steps
    checkpoint_every: int  # steps
    keep_checkpoints: int  # the newest N stay
    held_out: Sequence[str]  # record files whose loss is measured at every checkpoint; the best of these is kept
    sample_every: int  # steps; 0: never
    sample_records: Sequence[str]  # record files, sampled at these steps
    sample_steps: int | None  # solver steps for them; None: the official ones
    trackers: Sequence[str]  # tensorboard, wandb, ...

    def __post_init__(self):
        check_types(self, "train")
        self._check_names()
        self._check_ranges()
        if self.pretrained is None and self.tokenizer is None:
            raise ConfigError("train.pretrained is None: fresh weights need train.tokenizer, a tokenizer folder")
        if self.pretrained is None and self.trainable == "lora":
            raise ConfigError("train.trainable is 'lora', but train.pretrained is None: adapters need trained weights")
        # The updates, a millionth of a weight, would be rounded away. Adapters are float32 whatever lies below them.
        if self.precision == "bfloat16" and self.optimizer != "adamw" and self.trainable != "lora":
            raise ConfigError(
                f"train.precision is 'bfloat16', but train.optimizer is {self.optimizer!r}, whose updates bfloat16 "
                "rounds away: set train.optimizer=adamw, or train.precision=mixed"
            )
        if self.trainable == "lora" and self.optimizer == "muon":
            raise ConfigError("train.optimizer is 'muon', which trains whole matrices: use adamw with 'lora'")
        if self.trainable == "lora" and not self.lora_targets:
            raise ConfigError("train.lora_targets is empty: name what gets adapters, such as 'dit_attention'")
        if self.lora is not None and self.trainable != "lora":
            raise ConfigError(f"train.lora={self.lora} needs train.trainable='lora', which is {self.trainable!r}")
        if self.trainable == "lora" and self.ema is not None:
            raise ConfigError("train.ema averages whole models; set it to None for 'lora'")
        if self.sample_every and not self.sample_records:
            raise ConfigError("train.sample_every is set, but train.sample_records names no file")

    @property
    def param_dtype(self) -> str:
        """Of the parameters, "float32" or "bfloat16"; of frozen ones with LoRA, whose adapters are float32."""
        return "bfloat16" if self.precision == "bfloat16" else "float32"

    @property
    def mixed_precision(self) -> str:
        """accelerate's word for the products: "bf16" under autocast, "no" in the parameters' own dtype."""
        adapters = self.precision == "bfloat16" and self.trainable == "lora"
        return "bf16" if self.precision == "mixed" or adapters else "no"

    def _check_names(self) -> None:
        for name, known in _TRAIN_NAMES.items():
            given = getattr(self, name) or ()
            for one in [given] if isinstance(given, str) else given:
                one_of(f"train.{name}", one, known)

    def _check_ranges(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "noise_levels", "log_every",
                     "checkpoint_every", "keep_checkpoints", "lr_reference_batch", "lora_rank"):  # fmt: skip
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup", "cooldown", "sample_every", "weight_decay", "snr_power"):
            at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "eps", "max_grad_norm"):
            positive(f"train.{name}", getattr(self, name))
        within("train.seed", self.seed, 0, 2**32 - 1)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"train.betas is {self.betas}, expected two numbers from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"train.ema is {self.ema}, expected None or a number between 0 and 1")
        for name in ("snr_gamma", "lora_alpha"):
            if getattr(self, name) is not None:
                positive(f"train.{name}", getattr(self, name))
        if self.sample_steps is not None:
            at_least("train.sample_steps", self.sample_steps, 1)


@dataclass(frozen=True)
class DistillationConfig:
    """Whom a few-step student follows (train_scripts/distill.py); `train.pretrained` is its teacher."""

    steps: int  # of the student
    teacher_steps: int  # of the teacher's solver, a multiple of them
    guidance: float  # of the teacher, towards the instruction; inside the student from then on
    source_guidance: float  # ... towards the edited image

    def __post_init__(self):
        check_types(self, "distillation")
        at_least("distillation.steps", self.steps, 1)
        at_least("distillation.guidance", self.guidance, 0)
        at_least("distillation.source_guidance", self.source_guidance, 0)
        if self.teacher_steps < self.steps or self.teacher_steps % self.steps:
            raise ConfigError(
                f"distillation.teacher_steps is {self.teacher_steps}, expected a multiple of distillation.steps, "
                f"which is {self.steps}: the student is asked at points of the teacher's path"
            )


@dataclass(frozen=True)
class Config:
    """A whole config file."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    distillation: DistillationConfig | None = None

    def __post_init__(self):
        batch, block = self.train.batch_size, self.data.shape_block
        if block is not None and block % batch:
            raise ConfigError(f"data.shape_block is {block}, expected a multiple of train.batch_size, which is {batch}")

    @property
    def shape_block(self) -> int:
        """Samples in a row whose images have one of `data.shapes`."""
        return self.data.shape_block or self.train.batch_size

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
        apply_override(data, override, str(path))
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    if "distillation" in data:
        sections["distillation"] = DistillationConfig
    refuse_unknown(data.keys() - sections.keys(), str(path), sections.keys())
    refuse_missing(sections.keys() - data.keys(), str(path))
    return Config(**{name: _section(cls, data[name], f"{path}: {name}") for name, cls in sections.items()})


def _section(cls: type, data: Any, where: str):
    known = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a dict, got {type(data).__name__}")
    refuse_unknown(data.keys() - known, where, known)
    refuse_missing(known - data.keys(), where)
    return cls(**data)

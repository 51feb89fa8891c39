"""Checkpoint folders, checked part by part and key by key before anything is loaded.

The libraries only warn about a missing weight and fill it with random numbers, and make a tokenizer without a
vocabulary: here both are errors.
"""

import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, PixArtTransformer2DModel, SchedulerMixin
from torch import nn
from transformers import Blip2QFormerModel, Blip2VisionModel, PreTrainedTokenizerBase, T5EncoderModel

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.weight_files import SUFFIXES, files_to_read, has_variant, header, mismatches, read_json
from mige.diffusion.few_step import FewStepSolver
from mige.diffusion.solver import DPMSolver2M, why_not
from mige.models.fusion import MIGEFusion

CLASSES: dict[str, type[nn.Module]] = {
    "transformer": PixArtTransformer2DModel,
    "text_encoder": T5EncoderModel,
    "image_encoder": Blip2VisionModel,
    "qformer": Blip2QFormerModel,
    "fusion": MIGEFusion,
    "vae": AutoencoderKL,
}
OTHERS = ("tokenizer", "scheduler")
_OWN = {
    "MIGEFusion": ("mige.models.fusion", "mige.fusion"),
    "DPMSolver2M": ("mige.diffusion.solver", "mige.sampler"),
    "FewStepSolver": ("mige.diffusion.few_step",),
}
"""Our classes in model_index.json: where they live, and where version 0.1.0 had them."""
_SCHEDULERS = {"DPMSolver2M": DPMSolver2M, "FewStepSolver": FewStepSolver}

_PROBE = "follow the instruction to edit the image: a cat in the jungle and a photo of two dogs at night"
"""Plain English, of which every model reads every word."""


def verify(folder: Path, variant: str | None = None) -> None:
    """Compare every part's files with what its config asks for, reading headers only; open tokenizer and scheduler.

    Args:
        variant: of the weight files, such as "fp16"; a part that has none of it is read without, as diffusers does.

    Raises CheckpointError naming every missing part, every file that would be left out, every key that is missing,
    unexpected or of another shape, and what is wrong with classes, dtypes, tokenizer and scheduler.
    """
    index = folder / "model_index.json"
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder, expected one with model_index.json (convert official files "
                              "with tools/convert_checkpoint.py)")  # fmt: skip
    if not index.is_file():
        raise CheckpointError(f"{folder}: not a checkpoint folder, it has no model_index.json (convert official files "
                              "with tools/convert_checkpoint.py)")  # fmt: skip
    if variant is not None and not (isinstance(variant, str) and re.fullmatch(r"[\w-]+", variant)):
        raise CheckpointError(f"{folder}: variant is {variant!r}, expected a word such as 'fp16', or None")
    listed = read_json(index)
    errors = [f"{name}: missing from {index.name} or from the folder" for name in (*CLASSES, *OTHERS)
              if name not in listed or not (folder / name).is_dir()]  # fmt: skip
    errors += _index_errors(listed) + _stray_errors(folder)
    with_variant = [
        name for name, cls in CLASSES.items() if variant and has_variant(folder / name, _stem(cls), variant)
    ]
    if variant and not with_variant:
        # begins as diffusers' own error does, for those who look for its words
        told = f"You are trying to load the model files of the `variant={variant}`"
        errors.append(f"{told}, but no part has weights of it, such as model.{variant}.safetensors")
    for name, cls in CLASSES.items():
        if (folder / name).is_dir():
            own = variant if name in with_variant else None
            errors += [f"{name}: {error}" for error in _part_errors(cls, folder / name, own)]
    if (folder / "tokenizer").is_dir():
        errors += [f"tokenizer: {error}" for error in _tokenizer_errors(folder, listed.get("tokenizer"))]
    if (folder / "scheduler").is_dir():
        errors += [f"scheduler: {error}" for error in _scheduler_errors(folder / "scheduler", listed.get("scheduler"))]
    if errors:
        raise CheckpointError(f"{folder}: {len(errors)} error(s):\n  " + "\n  ".join(errors))


def _stem(cls: type) -> str:
    """How a class's weight files are called."""
    return "model" if getattr(cls, "config_class", None) is not None else "diffusion_pytorch_model"


def _index_errors(listed: dict[str, Any]) -> list[str]:
    """What model_index.json says of classes that is not so."""
    errors = []
    pipeline = listed.get("_class_name")
    if "MIGEPipeline" not in (pipeline if isinstance(pipeline, list) else [pipeline]):
        errors.append(f"model_index.json is of {pipeline!r}, expected 'MIGEPipeline'")
    for name, value in listed.items():
        if name.startswith("_"):
            continue
        if name not in (*CLASSES, *OTHERS):
            errors.append(f"{name}: model_index.json names it, but a MIGE model has no such part")
        elif not (isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)):
            errors.append(f"{name}: model_index.json says {value!r}, expected [library, class]")
        elif name in CLASSES:
            cls = CLASSES[name]
            libraries = _OWN.get(cls.__name__, (cls.__module__.split(".")[0],))
            if value[0] not in libraries or value[1] != cls.__name__:
                errors.append(f"{name}: model_index.json says {value}, expected {[libraries[0], cls.__name__]}")
    return errors


def _stray_errors(folder: Path) -> list[str]:
    """Weight files where no part would read them: beside the parts, in folders that are none, below a part's own."""
    errors = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).parts
        beside_weights = len(place) == 2 and place[0] in CLASSES  # `files_to_read` judges these
        if path.suffix.lower() in SUFFIXES and not beside_weights and not any(name.startswith(".") for name in place):
            errors.append(f"{'/'.join(place)}: a weight file that nothing reads: remove it")
    return errors


def _part_errors(cls: type[nn.Module], folder: Path, variant: str | None) -> list[str]:
    if not (folder / "config.json").is_file():
        return ["expected config.json"]
    try:
        files, errors = files_to_read(folder, _stem(cls), variant)
        config = read_json(folder / "config.json")
        found = {key: stored for file in files for key, stored in header(file).items()}
        part = build_empty(cls, config)
    except CheckpointError as error:
        return [f"damaged: {error}"]
    errors += _config_errors(cls, config)
    if not files:
        return sorted(errors)
    tensors = dict(part.named_parameters()) | dict(part.named_buffers())  # a tied tensor by its first name
    saved = part.state_dict(keep_vars=True)
    expected = {key: tensor for key, tensor in tensors.items() if key in saved}
    return sorted([*errors, *mismatches(found, expected, saved.keys() - expected.keys())])


def _config_errors(cls: type[nn.Module], config: dict) -> list[str]:
    """What config.json says of the class, the kind of model or its storage that is not so."""
    architectures = config.get("architectures") or []
    named = [config.get("_class_name", cls.__name__)]
    named += architectures if isinstance(architectures, list) else [architectures]
    errors = [f"config.json is of {other}, expected {cls.__name__}" for other in named if other != cls.__name__]
    kind = getattr(getattr(cls, "config_class", None), "model_type", None)
    if kind is not None and config.get("model_type", kind) != kind:
        errors.append(f"config.json is of a {config['model_type']!r} model, expected {kind!r}")
    if "quantization_config" in config:
        errors.append("config.json has a quantization_config, but only plain weights are read: save it unquantised")
    for name in ("shift_factor", "latents_mean", "latents_std") if cls is AutoencoderKL else ():
        if config.get(name):
            errors.append(f"config.json has {name} {config[name]!r}, but MIGE's latents are scaled only")
    scale = config.get("scaling_factor", 1)
    if cls is AutoencoderKL and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
        errors.append(f"config.json has scaling_factor {scale!r}, expected a number above 0")
    for name in ("timestep_dtype", "vision_dtype") if cls is MIGEFusion else ():
        dtype = getattr(torch, str(config.get(name, "float32")), None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            errors.append(f"config.json has {name} {config[name]!r}, expected a float dtype such as 'float32'")
    return errors


def build_empty(cls: type[nn.Module], config: dict) -> nn.Module:
    """A part without weights, on the "meta" device; raises CheckpointError where its class refuses the config."""
    try:
        with torch.device("meta"):
            if getattr(cls, "config_class", None) is not None:  # a class of transformers
                return cls(cls.config_class.from_dict(config))
            return cls.from_config(config)
    except Exception as error:  # the libraries raise anything, from AssertionError to NotImplementedError
        raise CheckpointError(f"config.json: {cls.__name__} refuses it: {error}") from error


def _tokenizer_errors(folder: Path, listed: Any) -> list[str]:
    """A tokenizer of a class of transformers that loads, knows words, and whose ids the text encoder has."""
    path = folder / "tokenizer"
    if not (isinstance(listed, list) and len(listed) == 2):
        return []  # told of model_index.json
    cls = getattr(transformers, str(listed[1]), None)
    if listed[0] != "transformers" or not (isinstance(cls, type) and issubclass(cls, PreTrainedTokenizerBase)):
        return [f"model_index.json says {listed}, expected a tokenizer of transformers, such as 'T5Tokenizer'"]
    if not any((path / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        return ["expected tokenizer.json or spiece.model: without them every prompt becomes unknown tokens"]
    try:
        tokenizer = cls.from_pretrained(path)  # the very class that the pipeline will open
        ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    except Exception as error:  # transformers and tokenizers raise anything
        return [f"cannot be loaded: {error}"]
    errors = []
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    if unknown or not ids:
        errors.append(f"{unknown} of {len(ids)} tokens of {_PROBE!r} are unknown: its vocabulary is not T5's")
    for name in ("eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(tokenizer, name) is None:
            errors.append(f"it has no {name}")
    try:
        config = read_json(folder / "text_encoder" / "config.json")
    except CheckpointError:
        return errors  # told of the text encoder
    size = config.get("vocab_size")
    for name in ("eos_token_id", "pad_token_id"):
        own, wanted = getattr(tokenizer, name), config.get(name)
        if None not in (own, wanted) and own != wanted:
            errors.append(f"its {name} is {own}, the text encoder's is {wanted}")
    if isinstance(size, int) and len(tokenizer) > size:
        errors.append(f"{len(tokenizer)} tokens, but the text encoder has embeddings of {size}")
    return errors


def _scheduler_errors(folder: Path, listed: Any) -> list[str]:
    """A scheduler of a known class, with a noise schedule that is one."""
    try:
        config = read_json(folder / "scheduler_config.json")
    except CheckpointError as error:
        return [str(error)]
    if not (isinstance(listed, list) and len(listed) == 2):
        return []  # told of model_index.json
    library, name = listed
    cls = _SCHEDULERS.get(name) or getattr(diffusers, str(name), None)
    libraries = _OWN.get(name, ("diffusers",))
    if library not in libraries or not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        return [f"model_index.json says {listed}, expected a scheduler of diffusers or {_OWN['DPMSolver2M'][0]}"]
    if config.get("_class_name", name) != name:
        return [f"scheduler_config.json is of {config['_class_name']}, model_index.json says {name}"]
    try:
        scheduler = cls.from_config(config)
    except Exception as error:  # diffusers raises anything
        return [f"scheduler_config.json: {name} refuses it: {error}"]
    reason = why_not(scheduler)
    return [reason] if reason else []

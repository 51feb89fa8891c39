"""Checkpoint folders: written whole or not at all, and checked key by key before anything is loaded.

The libraries only warn about a missing weight and fill it with random numbers; here that is an error.
"""

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Blip2QFormerModel, Blip2VisionModel, T5EncoderModel

from mige.checkpoints.errors import CheckpointError
from mige.models.fusion import MIGEFusion

_CLASSES: dict[str, type[nn.Module]] = {
    "transformer": PixArtTransformer2DModel,
    "text_encoder": T5EncoderModel,
    "image_encoder": Blip2VisionModel,
    "qformer": Blip2QFormerModel,
    "fusion": MIGEFusion,
    "vae": AutoencoderKL,
}
OTHERS = ("tokenizer", "scheduler")


def verify(folder: Path) -> None:
    """Compare every part's files with what its config asks for, reading headers only.

    Raises CheckpointError naming every missing part and every missing, unexpected or misshapen key.
    """
    index = folder / "model_index.json"
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder; correct the path of the model")
    if not index.is_file():
        raise CheckpointError(f"{folder}: not a checkpoint folder, it has no model_index.json (convert official files "
                              "with tools/convert_checkpoint.py)")  # fmt: skip
    listed = _read_json(index)
    faults = [f"{name}: missing from {index.name} or from the folder" for name in (*_CLASSES, *OTHERS)
              if name not in listed or not (folder / name).is_dir()]  # fmt: skip
    for name, cls in _CLASSES.items():
        if (folder / name).is_dir():
            faults += [f"{name}: {fault}" for fault in _part_faults(cls, folder / name)]
    if faults:
        raise CheckpointError(f"{folder}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))


def _part_faults(cls: type[nn.Module], folder: Path) -> list[str]:
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return ["expected config.json and *.safetensors files"]
    try:
        found = {key: shape for file in files for key, shape in _header(file).items()}
        listed = [file for path in folder.glob("*.index.json") for file in _read_json(path, "weight_map").values()]
        part = _build(cls, _read_json(folder / "config.json"))
    except CheckpointError as error:
        return [f"damaged: {error}"]
    tensors = dict(part.named_parameters()) | dict(part.named_buffers())  # a tied tensor by its first name
    saved = part.state_dict(keep_vars=True)
    expected = {key: tuple(t.shape) for key, t in tensors.items() if key in saved}
    aliases = saved.keys() - expected.keys()
    names = {file.name for file in files}
    faults = [f"missing file {name}" for name in set(listed) - names]
    faults += [f"{name} is in no index" for name in names - set(listed) if re.search(r"-\d+-of-\d+", name)]
    faults += [f"missing {key}" for key in expected.keys() - found.keys()]
    faults += [f"unexpected {key}" for key in found.keys() - expected.keys() - aliases]
    faults += [
        f"{key} is {list(found[key])}, its config says {list(shape)}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return sorted(faults)


def _build(cls: type[nn.Module], config: dict) -> nn.Module:
    try:
        with torch.device("meta"):
            if hasattr(cls, "config_class") and cls.config_class is not None:  # a class of transformers
                return cls(cls.config_class.from_dict(config))
            return cls.from_config(config)
    except Exception as error:  # the libraries raise anything, from AssertionError to NotImplementedError
        raise CheckpointError(f"config.json: {cls.__name__} refuses it: {error}") from error


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file.name}: {error}") from error


def _read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file, or the one below the given keys."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object" + "".join(f" with the key {key!r}" for key in keys))
    return data

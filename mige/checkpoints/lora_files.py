"""Files of adapters, in PEFT's own format and in diffusers' layout: opened, told apart by part, their configs read."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.folder import CLASSES
from mige.checkpoints.weight_files import read_json

PARTS = ("transformer", "text_encoder", "qformer", "fusion")
"""The parts of a model that adapters may belong to, as its folder names them."""
PEFT_FILE, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
PEFT_PREFIX = "base_model.model."
_FOREIGN = {
    "lora_unet_": "kohya's",
    "lora_transformer_": "kohya's",
    "lora_te": "kohya's, of a text encoder",
    "unet.": "diffusers', of a U-Net",
    "diffusion_model.": "ComfyUI's",
    "lycoris_": "LyCORIS'",
    "transformer_blocks.": "without a prefix, or diffusers' of before PEFT",
}


@dataclass(frozen=True)
class Opened:
    """The adapters of one part in a file.

    Attributes:
        state: tensors of any shape, by the layer of the part. metadata: of the whole file.
    """

    part: str
    file: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]

    def config(self) -> LoraConfig:
        """Ranks, alphas and targets; raises CheckpointError for what is none of plain LoRA."""
        if self.file.name == PEFT_FILE:
            return _peft_config(self.file.parent, CLASSES[self.part].__name__)
        return _diffusers_config(self)

    def weights(self) -> dict[str, Tensor]:
        """The tensors, of any shape, without diffusers' alphas, which are read into the config: PEFT's has none."""
        own = self.state.items()
        return {k: v for k, v in own if self.file.name == PEFT_FILE or not k.endswith(".alpha")}


def open_lora(path: Path) -> dict[str, Opened]:
    """The adapters of a file, or of a folder, by part.

    A folder holds diffusers' file, of all parts, or PEFT's two files, of the DiT; PEFT's of another part lie in a
    folder below of its name. Raises CheckpointError where there are none, and for a file that is none of the two.
    """
    below = {part: path / part for part in PARTS[1:] if (path / part / PEFT_FILE).is_file()}
    if below and (path / DIFFUSERS_FILE).is_file():
        raise CheckpointError(f"{path}: holds {DIFFUSERS_FILE} and {next(iter(below))}/{PEFT_FILE}; remove one")
    own = not below or (path / PEFT_FILE).is_file()
    found = {one.part: one for one in split_parts(*_read(_find(path)))} if own else {}
    for part, folder in below.items():
        [one] = split_parts(*_read(_find(folder)))
        found[part] = Opened(part, one.file, one.state, one.metadata)
    return found


def split_parts(file: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> list[Opened]:
    """Tensors of either layout, of any shape, by part and by the layer that they belong to; PEFT's are the DiT's.

    Raises CheckpointError for another layout, and for tensors that are no adapters.
    """
    if not state:
        raise CheckpointError(f"{file}: holds no tensor, so it would change nothing")
    for key, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{file}: {key} is stored as {value.dtype}, expected a float dtype")
        if not bool(value.float().isfinite().all()):
            raise CheckpointError(f"{file}: {key} has values that are not finite; train or copy it again")
        if key.endswith(".alpha") and value.numel() != 1:
            raise CheckpointError(f"{file}: {key} has the shape {list(value.shape)}, expected one number")
    if all(key.startswith(PEFT_PREFIX) for key in state):
        own = {key.removeprefix(PEFT_PREFIX): value for key, value in state.items()}
        return [Opened("transformer", file, own, metadata)]
    by_part: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        part, _, layer = key.partition(".")
        if part not in PARTS:
            layout = next((name for start, name in _FOREIGN.items() if key.startswith(start)), "an unknown one")
            raise CheckpointError(f"{file}: its layout is {layout} ({key}); expected PEFT's (base_model.model.*) or "
                                  f"diffusers' ({', '.join(f'{part}.*' for part in PARTS)})")  # fmt: skip
        by_part[part][layer] = value
    return [Opened(part, file, by_part[part], metadata) for part in PARTS if part in by_part]


def _find(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / PEFT_FILE).is_file() and (path / DIFFUSERS_FILE).is_file():
        raise CheckpointError(f"{path}: holds both {PEFT_FILE} and {DIFFUSERS_FILE}; remove one, or name the file")
    if (path / PEFT_FILE).is_file() and (path / "adapter_config.json").is_file():
        return path / PEFT_FILE
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE
    there = f"it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}" if path.is_dir() else \
        "no such folder"  # fmt: skip
    raise CheckpointError(f"{path}: expected {PEFT_FILE} and adapter_config.json, or {DIFFUSERS_FILE}; {there}")


def _read(file: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file itself, its tensors and its metadata."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            return file, {key: tensors.get_tensor(key) for key in tensors.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or cut off: {error}; copy it again") from error


def _peft_config(folder: Path, expected: str) -> LoraConfig:
    path = folder / "adapter_config.json"
    kind = read_json(path).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f'{path}: its "peft_type" is {kind!r}, expected "LORA"')
    try:
        config = LoraConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: PEFT refuses it: {error}") from error
    if config.init_lora_weights not in (True, False, "gaussian"):
        raise CheckpointError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}, with which PEFT changes the model's own "
            "weights: convert the adapters to plain LoRA when you save them"
        )
    base = (config.auto_mapping or {}).get("base_model_class", expected)
    if base != expected:
        raise CheckpointError(f"{path}: adapters of a {base}, expected those of a {expected}")
    return config


def _diffusers_config(given: Opened) -> LoraConfig:
    """Rank and alpha of every layer: of the metadata, else of alpha tensors, else alpha = rank."""
    file, state = given.file, given.state
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith(".lora_A.weight")}
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in state.items() if k.endswith(".alpha")}
    if not ranks:
        raise CheckpointError(f"{file}: no key ends in .lora_A.weight ({next(iter(state))} is another layout, such as "
                              "diffusers' of before PEFT); expected PEFT's or diffusers' of today")  # fmt: skip
    if foreign := sorted(alphas.keys() - ranks.keys()):
        raise CheckpointError(f"{file}: unexpected {foreign[0]}.alpha, without {foreign[0]}.lora_A.weight")
    told = _told(given)
    own = told.get("alpha_pattern") or {}
    alphas = {m: own[key] for m in ranks if (key := get_pattern_key(own, m)) in own} | alphas
    pattern = {module: alphas.get(module, told.get("lora_alpha", rank)) for module, rank in ranks.items()}
    return LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(pattern.values())),
        rank_pattern=ranks,
        alpha_pattern=pattern,
        target_modules=told.get("target_modules") or sorted(ranks),
        exclude_modules=told.get("exclude_modules"),
        use_rslora=bool(told.get("use_rslora", False)),
    )


def _told(given: Opened) -> dict[str, Any]:
    """What the file's metadata says of this part: the arguments of its LoraConfig, as diffusers writes them."""
    text = given.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        by_key = dict(json.loads(text))
        own = {key.removeprefix(f"{given.part}."): value for key, value in by_key.items()}
        dict(own.get("alpha_pattern") or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{given.file}: its metadata is not a JSON object of a LoRA config: {error}") from error
    if other := [key for key in by_key if "." in key and not key.startswith((PEFT_PREFIX, *(f"{p}." for p in PARTS)))]:
        raise CheckpointError(f"{given.file}: its metadata is of another part ({other[0]}), expected {given.part}.*")
    if own.get("use_dora"):
        raise CheckpointError(f"{given.file}: its metadata says use_dora, but there are plain LoRA tensors alone")
    return own

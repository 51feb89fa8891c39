"""Low-rank adapters in the DiT's attention: PEFT's own file format, and diffusers' layout."""

import hashlib
import json
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.weight_files import read_json

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
_ADAPTER = "default"
_PEFT, _DIFFUSERS = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PREFIXES = {_PEFT: "base_model.model.", _DIFFUSERS: "transformer."}
_FOREIGN = {
    "lora_unet_": "kohya's",
    "lora_transformer_": "kohya's",
    "lora_te": "kohya's, of a text encoder",
    "unet.": "diffusers', of a U-Net",
    "text_encoder.": "diffusers', of a text encoder",
    "diffusion_model.": "ComfyUI's",
}


def add_lora(transformer: PixArtTransformer2DModel, rank: int) -> None:
    """Put fresh adapters of this rank on all attention projections, in place; only they are trainable then."""
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS), transformer, _ADAPTER)


def save_lora(transformer: PixArtTransformer2DModel, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them.

    The file's metadata tells the base it was trained on, so that another one is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(transformer, adapter_name=_ADAPTER)
    tensors = {f"{_PREFIXES[_PEFT]}{key}": value.contiguous().cpu() for key, value in state.items()}
    save_file(tensors, folder / _PEFT, metadata={"format": "pt", "base": fingerprint(transformer)})
    transformer.peft_config[_ADAPTER].save_pretrained(folder)


def fingerprint(transformer: PixArtTransformer2DModel) -> str:
    """A digest of the DiT's weights in and out, as bfloat16: the same in whatever precision they were loaded."""
    digest = hashlib.sha256()
    for layer in (transformer.pos_embed.proj, transformer.proj_out):
        digest.update(layer.weight.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def merge_lora(transformer: PixArtTransformer2DModel, path: Path) -> PixArtTransformer2DModel:
    """The transformer with adapters added into its weights: no slower than without.

    Args:
        path: a folder with PEFT's adapter_model.safetensors and adapter_config.json or diffusers'
            pytorch_lora_weights.safetensors, or that last file.

    Raises CheckpointError if nothing of the kind lies there, a file is damaged, the layout is another program's, or
    the adapters and the model do not match: a key too many, a module without its adapter, sizes, the base.
    """
    file = _find(path)
    state, metadata = _read(file)
    if "base" in metadata and metadata["base"] != fingerprint(transformer):
        raise CheckpointError(f"{file}: trained on another base model; load the one it was trained on")
    config = _peft_config(file.parent) if file.name == _PEFT else _diffusers_config(file, state, metadata)
    state = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    _check_modules(file, state, transformer)
    try:
        model = get_peft_model(transformer, config, adapter_name=_ADAPTER)
        wanted = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
        own = {f"{_PREFIXES[_PEFT]}{key}": value for key, value in state.items()}
        _compare(file, own, wanted)
        set_peft_model_state_dict(model, own, adapter_name=_ADAPTER)
        return model.merge_and_unload()
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: these adapters do not fit the model: {error}") from error


def _find(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / _PEFT).is_file() and (path / "adapter_config.json").is_file():
        return path / _PEFT
    if (path / _DIFFUSERS).is_file():
        return path / _DIFFUSERS
    there = f"it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}" if path.is_dir() else \
        "no such folder"  # fmt: skip
    raise CheckpointError(f"{path}: expected {_PEFT} and adapter_config.json, or {_DIFFUSERS}; {there}")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the module of the DiT they belong to, and the file's metadata."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or cut off: {error}; copy it again") from error
    if not state:
        raise CheckpointError(f"{file}: holds no tensor, so it would change nothing")
    prefix = next((p for p in _PREFIXES.values() if all(key.startswith(p) for key in state)), None)
    if prefix is None:
        key = next(key for key in state if not key.startswith(tuple(_PREFIXES.values())))
        layout = next((name for start, name in _FOREIGN.items() if key.startswith(start)), "an unknown one")
        raise CheckpointError(f"{file}: its layout is {layout} ({key}); expected PEFT's (base_model.model.*) or "
                              "diffusers' (transformer.*)")  # fmt: skip
    return {key.removeprefix(prefix): value for key, value in state.items()}, metadata


def _peft_config(folder: Path) -> LoraConfig:
    path = folder / "adapter_config.json"
    kind = read_json(path).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f'{path}: its "peft_type" is {kind!r}, expected "LORA"')
    try:
        return LoraConfig.from_pretrained(folder)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: PEFT refuses it: {error}") from error


def _diffusers_config(file: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> LoraConfig:
    """Rank and alpha of every module: of the metadata, else of alpha tensors, else alpha = rank."""
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith(".lora_A.weight")}
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in state.items() if k.endswith(".alpha")}
    if not ranks:
        raise CheckpointError(f"{file}: no key ends in .lora_A.weight, so it holds no LoRA adapters")
    told = {}
    if "lora_adapter_metadata" in metadata:
        try:
            given = json.loads(metadata["lora_adapter_metadata"])
            told = {key.removeprefix("transformer."): value for key, value in given.items()}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: its metadata is not JSON: {error}") from error
    pattern = {module: alphas.get(module, told.get("lora_alpha", rank)) for module, rank in ranks.items()}
    return LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(pattern.values())),
        rank_pattern=ranks,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
        use_rslora=bool(told.get("use_rslora", False)),
    )


def _check_modules(file: Path, state: dict[str, Tensor], transformer: PixArtTransformer2DModel) -> None:
    """Every key belongs to a linear layer of the model, which has both its halves."""
    modules, halves = dict(transformer.named_modules()), defaultdict(set)
    for key in state:
        module, _, half = key.rpartition(".lora_")
        if module not in modules:
            raise CheckpointError(f"{file}: unexpected {key}: the model has no layer {module or key!r}")
        halves[module].add(half)
    for module, found in halves.items():
        if not {"A.weight", "B.weight"} <= found:
            raise CheckpointError(f"{file}: {module} has only {sorted(found)}, expected lora_A and lora_B")


def _compare(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    faults = [f"missing {key}" for key in sorted(wanted.keys() - found.keys())]
    faults += [f"unexpected {key}" for key in sorted(found.keys() - wanted.keys())]
    faults += [
        f"{key} is {list(found[key].shape)}, the model needs {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{file}: these adapters do not fit the model: {'; '.join(faults[:5])}{more}")

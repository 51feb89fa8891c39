"""Low-rank adapters in the DiT's attention: PEFT's own file format, and diffusers' layout."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.weight_files import files_to_read, read_json

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
_ADAPTER = "default"
_PEFT, DIFFUSERS_FILE = "adapter_model.safetensors", "pytorch_lora_weights.safetensors"
_PREFIXES = {_PEFT: "base_model.model.", DIFFUSERS_FILE: "transformer."}
_FOREIGN = {
    "lora_unet_": "kohya's",
    "lora_transformer_": "kohya's",
    "lora_te": "kohya's, of a text encoder",
    "unet.": "diffusers', of a U-Net",
    "text_encoder.": "diffusers', of a text encoder",
    "diffusion_model.": "ComfyUI's",
    "lycoris_": "LyCORIS'",
    "transformer_blocks.": "without a prefix, or diffusers' of before PEFT",
}
_BASE_KEYS = ("pos_embed.proj.weight", "proj_out.weight")


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


def fingerprint(transformer: PixArtTransformer2DModel, before: Mapping[str, Tensor] | None = None) -> str:
    """A digest of the DiT's weights in and out, as bfloat16: the same in whatever precision they were loaded.

    before: weights of any shape, by parameter, in place of the DiT's own, which adapters have changed.
    """
    before = before or {}
    return _digest([before.get(key, transformer.get_parameter(key)) for key in _BASE_KEYS])


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_lora(model: Path, path: Path) -> None:
    """Raise what `merge_lora` would raise for a (verified) model folder, before its weights are loaded."""
    part = model / "transformer"
    with torch.device("meta"):
        transformer = PixArtTransformer2DModel.from_config(read_json(part / "config.json"))
    file, state, metadata = open_lora(path)
    if "base" in metadata:
        tensors = {}
        for weights in files_to_read(part, "diffusion_pytorch_model", None)[0]:
            with safe_open(weights, framework="pt") as stored:
                tensors |= {key: stored.get_tensor(key) for key in stored.keys() if key in _BASE_KEYS}  # noqa: SIM118
        check_base(file, metadata, _digest([tensors[key] for key in _BASE_KEYS]))
    fit(transformer, file, state, metadata)


def merge_lora(transformer: PixArtTransformer2DModel, path: Path) -> PixArtTransformer2DModel:
    """The transformer with adapters added into its weights: no slower than without.

    Args:
        path: a folder with PEFT's adapter_model.safetensors and adapter_config.json or diffusers'
            pytorch_lora_weights.safetensors, or that last file.

    Raises CheckpointError if nothing of the kind lies there, a file is damaged, the layout is another program's, or
    the adapters and the model do not match: a key too many, a module without its adapter, sizes, the base.
    """
    file, state, metadata = open_lora(path)
    if "base" in metadata:
        check_base(file, metadata, fingerprint(transformer))
    model, own = fit(transformer, file, state, metadata)
    set_peft_model_state_dict(model, own, adapter_name=_ADAPTER)
    return model.merge_and_unload()


def open_lora(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The file of adapters, its tensors by the layer of the DiT they belong to, and its metadata.

    Tensors are of any shape; raises CheckpointError for what is none of the two layouts.
    """
    file = _find(Path(path))
    return file, *_read(file)


def check_base(file: Path, metadata: dict[str, str], digest: str) -> None:
    """Raise CheckpointError for adapters of another base than the one with this `fingerprint`."""
    if metadata["base"] != digest:
        raise CheckpointError(f"{file}: trained on another base model; load the one it was trained on")


def fit(
    transformer: PixArtTransformer2DModel, file: Path, state: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[PeftModel, dict[str, Tensor]]:
    """The model with the places for these adapters, and their tensors by PEFT's names, compared with each other.

    Tensors are [rank, in] and [out, rank]; raises CheckpointError where they do not fit the model or the config.
    """
    config = _peft_config(file.parent) if file.name == _PEFT else _diffusers_config(file, state, metadata)
    if file.name != _PEFT:  # read into the config; PEFT's layout has no such tensors
        state = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    _check_modules(file, state, transformer)
    try:
        model = get_peft_model(transformer, config, adapter_name=_ADAPTER)
        wanted = get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    except Exception as error:  # PEFT raises anything, KeyError for one
        raise CheckpointError(f"{file}: these adapters do not fit the model: {error}") from error
    own = {f"{_PREFIXES[_PEFT]}{key}": value for key, value in state.items()}
    _compare(file, own, wanted)
    _check_config(file, config, model)
    return model, own


def _check_config(file: Path, config: LoraConfig, model: PeftModel) -> None:
    """Every target that the config names has adapters, and none is multiplied by nothing."""
    scales = scales_of(model)
    for target in config.target_modules if not isinstance(config.target_modules, str) else ():
        if not any(name == target or name.endswith(f".{target}") for name in scales):
            raise CheckpointError(f"{file}: its config names the target {target!r}, but the model has no such layer")
    for name, scale in scales.items():
        if not (math.isfinite(scale) and scale > 0):
            raise CheckpointError(f"{file}: alpha / rank of {name} is {scale}, expected a number above 0")


def scales_of(model: PeftModel) -> dict[str, float]:
    """alpha / rank of every layer that has adapters, by its path."""
    return {name.removeprefix("base_model.model."): module.scaling[_ADAPTER]
            for name, module in model.named_modules() if _ADAPTER in getattr(module, "scaling", {})}  # fmt: skip


def _find(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / _PEFT).is_file() and (path / DIFFUSERS_FILE).is_file():
        raise CheckpointError(f"{path}: holds both {_PEFT} and {DIFFUSERS_FILE}; remove one, or name the file")
    if (path / _PEFT).is_file() and (path / "adapter_config.json").is_file():
        return path / _PEFT
    if (path / DIFFUSERS_FILE).is_file():
        return path / DIFFUSERS_FILE
    there = f"it holds {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}" if path.is_dir() else \
        "no such folder"  # fmt: skip
    raise CheckpointError(f"{path}: expected {_PEFT} and adapter_config.json, or {DIFFUSERS_FILE}; {there}")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the module of the DiT they belong to, and the file's metadata."""
    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or cut off: {error}; copy it again") from error
    return without_prefix(file, state), metadata


def without_prefix(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of either layout, of any shape, by the layer of the DiT they belong to.

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
    prefix = next((p for p in _PREFIXES.values() if all(key.startswith(p) for key in state)), None)
    if prefix is None:
        key = next(key for key in state if not key.startswith(tuple(_PREFIXES.values())))
        layout = next((name for start, name in _FOREIGN.items() if key.startswith(start)), "an unknown one")
        raise CheckpointError(f"{file}: its layout is {layout} ({key}); expected PEFT's (base_model.model.*) or "
                              "diffusers' (transformer.*)")  # fmt: skip
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _peft_config(folder: Path) -> LoraConfig:
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
    base = (config.auto_mapping or {}).get("base_model_class", PixArtTransformer2DModel.__name__)
    if base != PixArtTransformer2DModel.__name__:
        raise CheckpointError(f"{path}: adapters of a {base}, expected those of a {PixArtTransformer2DModel.__name__}")
    return config


def _diffusers_config(file: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> LoraConfig:
    """Rank and alpha of every module: of the metadata, else of alpha tensors, else alpha = rank."""
    ranks = {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith(".lora_A.weight")}
    alphas = {k.removesuffix(".alpha"): float(v) for k, v in state.items() if k.endswith(".alpha")}
    if not ranks:
        raise CheckpointError(f"{file}: no key ends in .lora_A.weight ({next(iter(state))} is another layout, such as "
                              "diffusers' of before PEFT); expected PEFT's or diffusers' of today")  # fmt: skip
    if foreign := sorted(alphas.keys() - ranks.keys()):
        raise CheckpointError(f"{file}: unexpected {foreign[0]}.alpha, without {foreign[0]}.lora_A.weight")
    told = {}
    if "lora_adapter_metadata" in metadata:
        try:
            given = json.loads(metadata["lora_adapter_metadata"])
            told = {key.removeprefix("transformer."): value for key, value in given.items()}
            own = dict(told.get("alpha_pattern") or {})
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: its metadata is not a JSON object of a LoRA config: {error}") from error
        if other := [key for key in told if key.startswith(("unet.", "text_encoder."))]:
            raise CheckpointError(f"{file}: its metadata is of another part ({other[0]}), expected transformer.*")
        if told.get("use_dora"):
            raise CheckpointError(f"{file}: its metadata says use_dora, but there are plain LoRA tensors alone")
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


def _check_modules(file: Path, state: dict[str, Tensor], transformer: PixArtTransformer2DModel) -> None:
    """Every key belongs to a linear layer of the model, which has both its halves."""
    modules, halves = dict(transformer.named_modules()), defaultdict(set)
    for key in state:
        module, _, half = key.rpartition(".lora_")
        if not module or module not in modules:
            raise CheckpointError(f"{file}: unexpected {key}: the model has no layer {module or key!r}")
        halves[module].add(half)
    for module, found in halves.items():
        if not {"A.weight", "B.weight"} <= found:
            raise CheckpointError(f"{file}: {module} has only {sorted(found)}, expected lora_A and lora_B")
    if not any(all(state[f"{module}.lora_{half}.weight"].any() for half in "AB") for module in halves):
        raise CheckpointError(f"{file}: every lora_A or lora_B is zero, so it would change nothing; are they trained?")


def _compare(file: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    errors = [f"missing {key}" for key in sorted(wanted.keys() - found.keys())]
    errors += [f"unexpected {key}" for key in sorted(found.keys() - wanted.keys())]
    errors += [
        f"{key} is {list(found[key].shape)}, the model needs {list(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        raise CheckpointError(f"{file}: these adapters do not fit the model: {'; '.join(errors[:5])}{more}")

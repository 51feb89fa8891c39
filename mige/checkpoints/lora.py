"""Low-rank adapters of linear layers: put in, written in PEFT's own format, compared with the model, merged."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.folder import CLASSES, build_empty
from mige.checkpoints.lora_files import PEFT_FILE, PEFT_PREFIX, Opened, open_lora
from mige.checkpoints.weight_files import files_to_read, read_json

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Of the DiT's self- and cross-attention."""
ADAPTER = "default"
_BASE_KEYS = ("pos_embed.proj.weight", "proj_out.weight")


def add_lora(part: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = ATTENTION) -> None:
    """Put fresh adapters on a part's linear layers, in place; only they are trainable then.

    Args:
        alpha: they count alpha / rank; the rank without.
        targets: ends of the layers' paths; those that the part does not have are left out.
    """
    part.requires_grad_(False)
    own = [target for target in targets if any(f".{name}".endswith(f".{target}") for name, _ in part.named_modules())]
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=own)
    inject_adapter_in_model(config, part, ADAPTER)


def save_lora(part: nn.Module, folder: Path, base: str | None = None) -> None:
    """adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them.

    The file's metadata tells rank, alpha and targets as diffusers' `load_lora_adapter` reads them, and the base
    (`fingerprint`, by default of the part, a DiT) they were trained on, so that another one is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, state = part.peft_config[ADAPTER], get_peft_model_state_dict(part, adapter_name=ADAPTER)
    tensors = {f"{PEFT_PREFIX}{key}": value.contiguous().cpu() for key, value in state.items()}
    told = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    metadata = {"format": "pt", "base": base or fingerprint(part)} | adapter_metadata(PEFT_PREFIX, told)
    save_file(tensors, folder / PEFT_FILE, metadata=metadata)
    config.save_pretrained(folder)


def adapter_metadata(prefix: str, told: Mapping[str, Any]) -> dict[str, str]:
    """What a file says of its adapters, as diffusers writes it: arguments of LoraConfig, each with a prefix."""
    return {
        "lora_adapter_metadata": json.dumps({f"{prefix}{key}": value for key, value in told.items()}, sort_keys=True)
    }


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
    """Raise what loading adapters would raise for a (verified) model folder, before its weights are loaded."""
    for opened in open_lora(Path(path)).values():
        if "base" in opened.metadata:
            tensors, folder = {}, model / "transformer"
            for weights in files_to_read(folder, "diffusion_pytorch_model", None)[0]:
                with safe_open(weights, framework="pt") as stored:
                    tensors |= {key: stored.get_tensor(key) for key in stored.keys() if key in _BASE_KEYS}  # noqa: SIM118
            check_base(opened, _digest([tensors[key] for key in _BASE_KEYS]))
        fit(build_empty(CLASSES[opened.part], read_json(model / opened.part / "config.json")), opened)


def merge_lora(transformer: PixArtTransformer2DModel, path: Path) -> PixArtTransformer2DModel:
    """The transformer with adapters added into its weights: no slower than without.

    Args:
        path: a folder with PEFT's adapter_model.safetensors and adapter_config.json or diffusers'
            pytorch_lora_weights.safetensors, or that last file.

    Raises CheckpointError if nothing of the kind lies there, a file is damaged, the layout is another program's, there
    are adapters of other parts, or they and the model do not match: a key too many, a module without its adapter,
    sizes, the base.
    """
    found = open_lora(Path(path))
    if other := sorted(found.keys() - {"transformer"}):
        raise CheckpointError(f"{path}: has adapters of {', '.join(other)} too: load them on a pipeline")
    opened = found["transformer"]
    if "base" in opened.metadata:
        check_base(opened, fingerprint(transformer))
    model, own = fit(transformer, opened)
    set_peft_model_state_dict(model, own, adapter_name=ADAPTER)
    return model.merge_and_unload()


def check_base(opened: Opened, digest: str) -> None:
    """Raise CheckpointError for adapters of another base than the one with this `fingerprint`."""
    if opened.metadata["base"] != digest:
        raise CheckpointError(f"{opened.file}: trained on another base model; load the one it was trained on")


def empty_twin(part: nn.Module) -> nn.Module:
    """A part of the same config without weights, on the "meta" device."""
    with torch.device("meta"):
        return part.from_config(part.config) if isinstance(part, ModelMixin) else type(part)(part.config)


def fit(part: nn.Module, opened: Opened) -> tuple[PeftModel, dict[str, Tensor]]:
    """The part with the places for these adapters, and their tensors by PEFT's names, compared with each other.

    Tensors are [rank, in] and [out, rank]; raises CheckpointError where they do not fit the model or the config.
    """
    config, state, file = opened.config(), opened.weights(), opened.file
    _check_modules(file, state, part)
    try:
        model = get_peft_model(part, config, adapter_name=ADAPTER)
        wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    except Exception as error:  # PEFT raises anything, KeyError for one
        raise CheckpointError(f"{file}: these adapters do not fit the model: {error}") from error
    own = {f"{PEFT_PREFIX}{key}": value for key, value in state.items()}
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


def scales_of(model: nn.Module) -> dict[str, float]:
    """alpha / rank of every layer that has adapters, by its path."""
    found = {}
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)  # of an attention layer of transformers a number
        if isinstance(scaling, dict) and ADAPTER in scaling:
            found[name.removeprefix(PEFT_PREFIX)] = scaling[ADAPTER]
    return found


def _check_modules(file: Path, state: dict[str, Tensor], part: nn.Module) -> None:
    """Every key belongs to a linear layer of the model, which has both its halves."""
    modules, halves = dict(part.named_modules()), defaultdict(set)
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

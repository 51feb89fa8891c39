"""Where a pipeline's weights come from: a folder, a model of the hub by its name, or a state dict."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora import empty_twin
from mige.models.mige import MODEL_PREFIXES

HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")
"""Options of `from_pretrained` that say how the hub is asked; they mean nothing for a folder."""

LOADING = ("device_map", "max_memory", "low_cpu_mem_usage", "use_safetensors", "quantization_config", "offload_folder",
           "offload_state_dict", "disable_mmap", "output_loading_info")  # fmt: skip
"""Options of diffusers' `from_pretrained` that are handed on as they are."""


def check_options(given: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that would be dropped: neither the hub's, nor diffusers', nor a part."""
    if given.get("use_safetensors", True) not in (True, None):
        raise TypeError("use_safetensors is False, but MIGE reads *.safetensors files only; leave it out")
    if absent := [name for name in parts if name in given and given[name] is None]:
        raise TypeError(f"{absent[0]} is None, but a MIGE model needs it; give the part, or leave it out")
    known = {*HUB, *LOADING, *parts}
    if unknown := sorted(given.keys() - known):
        close = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
        raise TypeError(f"from_pretrained() got the unknown option(s) {', '.join(unknown)}{meant}")


def resolve_dtype(dtype: Any, torch_dtype: Any, parts: Iterable[str]) -> tuple[torch.dtype | dict, bool]:
    """The dtype to load with, of the two names of one option, and whether it is half precision as trained.

    None is float32, or transformers would take that of the file, and diffusers not. A half-precision dtype for all
    leaves VAE and vision tower in float32; the tower's products then follow the weights (`set_product_dtype`).
    Raises TypeError for two different ones, and as `check_dtype`.
    """
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise TypeError(f"dtype is {dtype} and torch_dtype {torch_dtype}: they are one option, give one of them")
    dtype = torch_dtype if dtype is None else dtype
    check_dtype(dtype, parts)
    if isinstance(dtype, torch.dtype) and dtype.itemsize < 4:
        return {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}, True
    return torch.float32 if dtype is None else dtype, False


def check_dtype(dtype: Any, parts: Iterable[str]) -> None:
    """Raise TypeError for what diffusers would take as float32 in silence: no float dtype, a part that is none."""
    by_part = dtype if isinstance(dtype, Mapping) else {None: dtype}
    for name, value in by_part.items():
        if name not in (None, "default", *parts):
            raise TypeError(f"dtype names {name!r}, expected 'default' or one of {', '.join(sorted(parts))}")
        # Of one byte are the float8 formats, in which nothing is computed.
        if value is not None and not (
            isinstance(value, torch.dtype) and value.is_floating_point and value.itemsize > 1
        ):
            place = "dtype" if name is None else f"dtype[{name!r}]"
            raise TypeError(f"{place} is {value!r}, expected a float dtype such as torch.bfloat16")


def locate(path: str | Path, download: Callable[..., str], **hub: Any) -> Path:
    """The folder of a checkpoint: `path` itself if it is one, else the hub's model of that name, downloaded.

    Args:
        download: the hub's door: (name, **hub) -> folder. hub: see `HUB`, and `variant`; None for the default.

    Raises CheckpointError for a path where nothing lies, and for a name that the hub does not give.
    """
    folder, text = Path(path), str(path)
    if folder.exists() or folder.is_symlink():
        return folder
    nearby = [entry.name for entry in Path().iterdir() if entry.is_dir()]
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not folder.parent.is_dir()
    typo = difflib.get_close_matches(folder.parts[0], nearby, 1) if is_name and len(folder.parts) > 1 else []
    if typo:
        raise CheckpointError(f"{path}: no such folder; did you mean {Path(typo[0], *folder.parts[1:])}?")
    if not is_name:
        raise CheckpointError(f"{path}: no such folder; correct the path, or name a model of the hub as owner/name")
    try:
        return Path(download(text, **{name: value for name, value in hub.items() if value is not None}))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: no such folder here, and the hub did not give it: {reason}") from error


def exchange_weights(components: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Fresh parts of a pipeline that hold a `MIGEModel` state dict: those of `MODEL_PREFIXES`, by name.

    Args:
        components: the pipeline's, of which configs and tables that no state dict holds are taken.
        state: tensors by `MIGEModel` key, of the parts' shapes, any float dtype; they become the parts' own.

    Raises RuntimeError for a key that is missing, unexpected or of another shape.
    """
    parts = {}
    for name, prefix in MODEL_PREFIXES.items():
        part = components[name]
        fresh = empty_twin(part)
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        fresh.load_state_dict(own, assign=True)
        for path, buffer in part.named_buffers():  # tables that no state dict holds
            module, _, buffer_name = path.rpartition(".")
            if fresh.get_buffer(path).is_meta:
                setattr(fresh.get_submodule(module), buffer_name, buffer)
        if name == "text_encoder":
            fresh.tie_weights()
        parts[name] = fresh
    return parts

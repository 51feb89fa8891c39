"""Low-rank adapters in the DiT's attention, in PEFT's own file format."""

from pathlib import Path

from diffusers import PixArtTransformer2DModel
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from mige.checkpoints.errors import CheckpointError

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of self- and cross-attention
_ADAPTER = "default"


def add_lora(transformer: PixArtTransformer2DModel, rank: int) -> None:
    """Put fresh adapters of this rank on all attention projections, in place; only they are trainable then."""
    transformer.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=_TARGETS), transformer, _ADAPTER)


def save_lora(transformer: PixArtTransformer2DModel, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as `PeftModel.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(transformer, adapter_name=_ADAPTER)
    tensors = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    transformer.peft_config[_ADAPTER].save_pretrained(folder)


def merge_lora(transformer: PixArtTransformer2DModel, folder: Path) -> PixArtTransformer2DModel:
    """The transformer with the adapters of `folder` added into its weights: no slower than without.

    Raises CheckpointError if the folder holds no adapters or adapters of other sizes.
    """
    if not (folder / "adapter_model.safetensors").is_file() or not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: expected adapter_model.safetensors and adapter_config.json")
    try:
        return PeftModel.from_pretrained(transformer, str(folder)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder}: these adapters do not fit the model: {error}") from error

"""Adapters as two low-rank matrices a layer: read with every check of `lora`, written in diffusers' layout."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import save
from torch import Tensor

from mige.checkpoints import lora
from mige.checkpoints.errors import CheckpointError
from mige.utils.files import write_bytes


@dataclass(frozen=True)
class Lora:
    """Adapters of the DiT's linear layers; dicts by the layer's path in it.

    Attributes:
        low: [rank, in] of each layer. up: [out, rank].
        scale: alpha / rank, by which their product counts.
        base: a digest of the DiT they were trained on (`lora.fingerprint`), where it is known.
    """

    low: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: dict[str, float]
    base: str | None = None

    def delta(self, layer: str, device: torch.device) -> Tensor:
        """What a layer's weight gains, float32 [out, in] (arXiv 2106.09685, eq. 3)."""
        up, low = self.up[layer].to(device, torch.float32), self.low[layer].to(device, torch.float32)
        return up @ low * self.scale[layer]


def read_lora(
    transformer: PixArtTransformer2DModel,
    given: Path | Mapping[str, Tensor],
    before: Mapping[str, Tensor] | None = None,
) -> Lora:
    """Adapters for a DiT, which stays as it is.

    Args:
        given: a folder or file as `lora.merge_lora` takes it, or a state dict in either layout, of any shapes.
        before: as of `lora.fingerprint`.

    Raises CheckpointError as `lora.merge_lora` does, and for more than two matrices a layer (DoRA).
    """
    if isinstance(given, Mapping):
        file, metadata = Path("state dict"), {}
        state = lora.without_prefix(file, dict(given))
    else:
        file, state, metadata = lora.open_lora(Path(given))
    if "base" in metadata:
        lora.check_base(file, metadata, lora.fingerprint(transformer, before))
    if other := [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight", ".alpha"))]:
        raise CheckpointError(f"{file}: {other[0]} is neither lora_A nor lora_B: merge such adapters with plain PEFT")
    with torch.device("meta"):
        empty = PixArtTransformer2DModel.from_config(transformer.config)
    model, own = lora.fit(empty, file, state, metadata)
    scales = lora.scales_of(model)
    half = {name: {layer: own[f"base_model.model.{layer}.lora_{name}.weight"] for layer in scales} for name in "AB"}
    return Lora(half["A"], half["B"], scales, metadata.get("base"))


def write_lora(adapters: Lora, folder: Path) -> None:
    """pytorch_lora_weights.safetensors as diffusers and PEFT read it; rank, alpha and base are in its metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted(adapters.scale)
    tensors = {}
    for layer in layers:
        tensors[f"transformer.{layer}.lora_A.weight"] = adapters.low[layer].contiguous().cpu()
        tensors[f"transformer.{layer}.lora_B.weight"] = adapters.up[layer].contiguous().cpu()
    ranks = {layer: len(adapters.low[layer]) for layer in layers}
    alphas = {layer: adapters.scale[layer] * ranks[layer] for layer in layers}
    rank, alpha = (Counter(one.values()).most_common(1)[0][0] for one in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": layers,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
    }
    metadata = {"format": "pt", **({} if adapters.base is None else {"base": adapters.base})}
    told = {f"transformer.{name}": value for name, value in config.items()}
    metadata["lora_adapter_metadata"] = json.dumps(told, indent=2, sort_keys=True)
    write_bytes(folder / lora.DIFFUSERS_FILE, save(tensors, metadata=metadata))

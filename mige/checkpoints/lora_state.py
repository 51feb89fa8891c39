"""Adapters as two low-rank matrices a layer: read with every check of `lora`, written in diffusers' layout."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from mige.checkpoints import lora
from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora_files import DIFFUSERS_FILE, PARTS, PEFT_PREFIX, open_lora, split_parts
from mige.utils.files import write_bytes


@dataclass(frozen=True)
class Lora:
    """Adapters of linear layers; dicts by the part and the layer's path in it, "transformer.proj_out".

    Attributes:
        low: [rank, in] of each layer. up: [out, rank].
        scale: alpha / rank, by which their product counts.
        base: a digest of the DiT they were trained on (`lora.fingerprint`), where it is known.
    """

    low: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: dict[str, float]
    base: str | None = None

    @property
    def parts(self) -> set[str]:
        """The parts that have any of these adapters."""
        return {at.partition(".")[0] for at in self.scale}

    def delta(self, layer: str, device: torch.device) -> Tensor:
        """What a layer's weight gains, float32 [out, in] (arXiv 2106.09685, eq. 3)."""
        up, low = self.up[layer].to(device, torch.float32), self.low[layer].to(device, torch.float32)
        return up @ low * self.scale[layer]


def read_lora(
    parts: Mapping[str, nn.Module], given: Path | Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> Lora:
    """Adapters for a model, which stays as it is.

    Args:
        parts: of a pipeline, by name; more than `lora_files.PARTS` do not matter.
        given: a folder or file as `lora_files.open_lora` takes it, or a state dict in either layout, of any shapes.
        before: weights of the DiT in place of its own, as of `lora.fingerprint`.

    Raises CheckpointError as `lora.merge_lora` does, and for more than two matrices a layer (DoRA).
    """
    if isinstance(given, Mapping):
        found = {one.part: one for one in split_parts(Path("state dict"), given, {})}
    else:
        found = open_lora(Path(given))
    low, up, scale, base = {}, {}, {}, None
    for name, opened in found.items():
        if "base" in opened.metadata:
            lora.check_base(opened, lora.fingerprint(parts["transformer"], before))
            base = opened.metadata["base"]
        if other := [key for key in opened.state if not key.endswith((".lora_A.weight", ".lora_B.weight", ".alpha"))]:
            raise CheckpointError(f"{opened.file}: {other[0]} is neither lora_A nor lora_B: merge such adapters with "
                                  "plain PEFT")  # fmt: skip
        model, own = lora.fit(lora.empty_twin(parts[name]), opened)
        for layer, factor in lora.scales_of(model).items():
            at = f"{name}.{layer}"
            low[at], up[at] = (own[f"{PEFT_PREFIX}{layer}.lora_{half}.weight"] for half in "AB")
            scale[at] = factor
    return Lora(low, up, scale, base)


def write_lora(adapters: Lora, folder: Path) -> None:
    """pytorch_lora_weights.safetensors as diffusers and PEFT read it; rank, alpha and base are in its metadata.

    Parts are told apart as diffusers does, by a prefix: transformer, text_encoder, qformer, fusion.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors, told = {}, {}
    for layer in sorted(adapters.scale):
        tensors[f"{layer}.lora_A.weight"] = adapters.low[layer].contiguous().cpu()
        tensors[f"{layer}.lora_B.weight"] = adapters.up[layer].contiguous().cpu()
    for part in PARTS:
        layers = [layer for layer in sorted(adapters.scale) if layer.startswith(f"{part}.")]
        if layers:
            told |= {f"{part}.{key}": value for key, value in _config(adapters, part, layers).items()}
    metadata = {"format": "pt", **({} if adapters.base is None else {"base": adapters.base})}
    write_bytes(folder / DIFFUSERS_FILE, save(tensors, metadata=metadata | lora.adapter_metadata("", told)))


def _config(adapters: Lora, part: str, layers: list[str]) -> dict[str, Any]:
    """The arguments of the LoraConfig of a part's layers."""
    ranks = {layer.removeprefix(f"{part}."): len(adapters.low[layer]) for layer in layers}
    alphas = {layer: adapters.scale[f"{part}.{layer}"] * rank for layer, rank in ranks.items()}
    rank, alpha = (Counter(one.values()).most_common(1)[0][0] for one in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ranks),
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
    }

"""A model with its adapters, as it goes from node to node: loaded when an image is first made.

Adapters come before a model is quantised or off-loaded, but behind the node that loads; so nothing is loaded before all
of them are known.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.model_management

if TYPE_CHECKING:
    from mige.inference.pipeline import MIGEPipeline

Adapters = tuple[tuple[Path, float], ...]  # folder or file, and scale


@dataclass(frozen=True)
class Mode:
    """How to compute: the memory modes of infer.py (docs/inference.md)."""

    dtype: str  # or "auto": bfloat16 on a GPU, else float32
    vae_dtype: str
    t5_bits: int | None
    offload: bool
    compile: bool
    vae_tiling: bool


class Weights:
    """One pipeline in memory. Whatever comes from one node of a workflow shares it, with the adapters of each."""

    def __init__(self, folder: Path, mode: Mode):
        self.folder, self.mode = folder, mode
        self._pipeline: MIGEPipeline | None = None
        self._adapters: Adapters = ()

    def pipeline(self, adapters: Adapters) -> "MIGEPipeline":
        """The pipeline with these adapters and no others; errors as of loading."""
        from mige.inference.adapters import add_adapters

        is_fixed = self.mode.offload or self.mode.t5_bits is not None
        if self._pipeline is None or (is_fixed and adapters != self._adapters):
            self._pipeline = None  # before the next is loaded
            self._pipeline = self._load(adapters)
        elif adapters != self._adapters:
            self._adapters = ()  # should one of them not fit
            self._pipeline.unload_lora_weights()
            for path, scale in adapters:
                add_adapters(self._pipeline, path, scale)
        self._adapters = adapters
        return self._pipeline

    def _load(self, adapters: Adapters) -> "MIGEPipeline":
        from mige.cli import model_options

        comfy.model_management.unload_all_models()  # ComfyUI's own: it comes back to them by itself
        device = comfy.model_management.get_torch_device()
        mode, usual = self.mode, "bfloat16" if device.type == "cuda" else "float32"
        args = Namespace(
            dtype=usual if mode.dtype == "auto" else mode.dtype,
            lora=adapters,
            vae_dtype=mode.vae_dtype,
            t5_bits=mode.t5_bits,
            offload=mode.offload,
            compile=mode.compile,
        )
        pipeline = model_options.load(args, self.folder, device, verified=True)
        pipeline.set_progress_bar_config(disable=True)
        if mode.vae_tiling:
            pipeline.enable_vae_tiling()
        return pipeline


@dataclass(frozen=True)
class Model:
    """What the nodes hand on. ComfyUI keeps it while a workflow needs it; with it goes the memory."""

    weights: Weights
    adapters: Adapters = ()

    def pipeline(self) -> "MIGEPipeline":
        """The pipeline that it stands for; errors as of loading."""
        return self.weights.pipeline(self.adapters)

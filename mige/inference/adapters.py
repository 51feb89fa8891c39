"""Low-rank adapters on a pipeline: several, each with a scale, loaded, exchanged and taken off again.

Adapters are added into the weights of the DiT, T5, Q-Former and fusion, in place, and the weights as they were are kept
in host memory: nothing is slower than without, `compile` needs no other layers, and taking adapters off gives back
every bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from mige.checkpoints.errors import CheckpointError
from mige.checkpoints.lora_files import PARTS
from mige.checkpoints.lora_state import Lora, read_lora, write_lora
from mige.checkpoints.weight_files import read_json
from mige.diffusion.few_step import FewStepSolver
from mige.inference import loading
from mige.inference.quantise import is_plain

_CONFIG = "scheduler_config.json"
_FILES = ["*.safetensors", "adapter_config.json", "*/adapter_config.json", _CONFIG]


@dataclass
class Stack:
    """The adapters of a pipeline.

    Attributes:
        loaded: by name. schedulers: of those that bring one, a few-step student's.
        scales: of the active ones. off: none counts, though some are active.
        fused: they stay when the adapters are unloaded.
        before: weights [out, in] without adapters, on the CPU, by part and layer. scheduler: the pipeline's own.
    """

    loaded: dict[str, Lora] = field(default_factory=dict)
    schedulers: dict[str, SchedulerMixin] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    off: bool = False
    fused: bool = False
    before: dict[str, Tensor] = field(default_factory=dict)
    scheduler: SchedulerMixin | None = None


class Adapters:
    """The methods of diffusers' LoRA loaders; the names and meanings are theirs."""

    _stack: Stack | None = None

    def load_lora_weights(
        self,
        path: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        beside: float | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **hub: Any,
    ) -> None:
        """Load adapters; they alone are active then, with scale 1, or with the scale `beside` next to those that are.

        Args:
            path: a folder or file in diffusers' or PEFT's layout, a model of the hub, or a state dict of any shapes.
            adapter_name: for `set_adapters`; "default_0", "default_1", ... without one.
            weight_name: a file of the folder. subfolder: of the folder. hub: `loading.HUB`.

        A few-step student's bring their sampler. Raises CheckpointError if they do not fit the model, ValueError for a
        name that is taken, for another sampler than that of active ones, and while adapters are fused.
        """
        stack = self._stack or Stack(scheduler=self.scheduler)
        name = adapter_name or f"default_{len(stack.loaded)}"
        if name in stack.loaded:
            raise ValueError(f"adapter_name is {name!r}, which is loaded: give another, or delete_adapters({name!r})")
        _refuse_fused(stack)
        if unknown := sorted(hub.keys() - set(loading.HUB)):
            raise TypeError(f"load_lora_weights() got the unknown option {unknown[0]!r}")
        place = path if isinstance(path, Mapping) else _locate(path, weight_name, subfolder, hub)
        before = {f"{at.removeprefix('transformer.')}.weight": value for at, value in stack.before.items()}
        adapters = read_lora(self.components, place, before)
        config = None if isinstance(place, Mapping) else own_config(place)
        scheduler = None if config is None else FewStepSolver.from_config(config)
        self._keep(stack, adapters)
        stack.loaded[name] = adapters
        if scheduler is not None:
            stack.schedulers[name] = scheduler
        self._stack = stack
        active = {} if beside is None else stack.scales
        try:
            self.set_adapters([*active, name], [*active.values(), 1.0 if beside is None else beside])
        except ValueError:  # a sampler beside another: as if they had never been loaded
            del stack.loaded[name]
            stack.schedulers.pop(name, None)
            raise

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Make these adapters the active ones, with a scale each (1 without any); all others count nothing.

        Raises ValueError for a name that is not loaded, a scale that is no number, while adapters are fused, and for
        two that bring different samplers.
        """
        stack = self._loaded()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if missing := [name for name in names if name not in stack.loaded]:
            raise ValueError(f"adapter {missing[0]!r} is not loaded; loaded are {', '.join(stack.loaded)}")
        if len(given) != len(names):
            raise ValueError(f"{len(names)} adapters, {len(given)} weights; give one each")
        scales = [1.0 if value is None else value for value in given]
        for value in scales:
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"the weight of an adapter is {value!r}, expected a number")
        self._activate(dict(zip(names, map(float, scales), strict=True)), off=False)

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return [] if self._stack is None or self._stack.off else list(self._stack.scales)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by part."""
        loaded = {} if self._stack is None else self._stack.loaded
        of_parts = {part: [name for name, one in loaded.items() if part in one.parts] for part in PARTS}
        return {part: names for part, names in of_parts.items() if names}

    def disable_lora(self) -> None:
        """The model without its adapters, until `enable_lora`."""
        self._switch(off=True)

    def enable_lora(self) -> None:
        """The active adapters count again."""
        self._switch(off=False)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; the others that are active stay so. Raises ValueError for a name that is not loaded."""
        stack = self._loaded()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        kept = {name: scale for name, scale in stack.scales.items() if name not in names}
        if missing := [name for name in names if name not in stack.loaded]:
            raise ValueError(f"adapter {missing[0]!r} is not loaded; loaded are {', '.join(stack.loaded)}")
        self._activate(kept, off=stack.off)
        for name in names:
            del stack.loaded[name]
            stack.schedulers.pop(name, None)

    def fuse_lora(self, *, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Make adapters part of the model, so that `unload_lora_weights` leaves them in.

        Args:
            lora_scale: a factor of all their scales.
            adapter_names: those to fuse; the active ones by default.

        Raises ValueError as `set_adapters`, and where none is loaded.
        """
        stack = self._loaded()
        names = list(stack.scales) if adapter_names is None else list(adapter_names)
        self.set_adapters(names, [stack.scales.get(name, 1.0) * lora_scale for name in names])
        stack.fused = True

    def unfuse_lora(self) -> None:
        """Adapters can be exchanged again; they stay active."""
        self._loaded().fused = False

    def unload_lora_weights(self) -> None:
        """Forget all adapters: the model as it was before, bit for bit, or with what was fused."""
        stack, self._stack = self._stack, None
        if stack is not None and not stack.fused:
            for at, before in stack.before.items():
                self._layer(at).weight.data.copy_(before)
            if self._fast is not None:
                self._fast.refresh()
            self.scheduler = stack.scheduler

    def save_lora_weights(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Write adapters as diffusers does: pytorch_lora_weights.safetensors, with rank, alpha and base.

        adapter_name: which; the only active one by default. A few-step student's sampler goes along. Raises ValueError
        where it is not loaded, or several are active.
        """
        stack, folder = self._loaded(), Path(save_directory)
        if adapter_name is None and len(stack.scales) != 1:
            raise ValueError(f"{len(stack.scales)} adapters are active: name the one to save")
        name = next(iter(stack.scales)) if adapter_name is None else adapter_name
        if name not in stack.loaded:
            raise ValueError(f"adapter {name!r} is not loaded; loaded are {', '.join(stack.loaded)}")
        write_lora(stack.loaded[name], folder)
        if name in stack.schedulers:
            stack.schedulers[name].save_config(folder)

    def _loaded(self) -> Stack:
        if self._stack is None or not self._stack.loaded:
            raise ValueError("no adapters are loaded: call load_lora_weights first")
        return self._stack

    def _activate(self, scales: dict[str, float], *, off: bool) -> None:
        """These are the active adapters from now on, with the sampler that they bring."""
        stack = self._stack
        own = [stack.schedulers[name] for name in scales if name in stack.schedulers]
        if len({str(scheduler.config) for scheduler in own}) > 1:
            raise ValueError(f"{', '.join(scales)} bring different samplers: make one of them active")
        _refuse_fused(stack)
        stack.scales, stack.off = scales, off
        self._apply()
        self.scheduler = own[0] if own else stack.scheduler

    def _switch(self, *, off: bool) -> None:
        stack = self._loaded()
        _refuse_fused(stack)
        stack.off = off
        self._apply()

    def _layer(self, at: str) -> nn.Module:
        """The layer of a part: "fusion.text_proj"."""
        part, _, path = at.partition(".")
        return self.components[part].get_submodule(path)

    def _keep(self, stack: Stack, adapters: Lora) -> None:
        """Keep the weights that adapters change; raises ValueError for a layer that none can be added to."""
        for at in adapters.scale:
            layer = self._layer(at)
            if not isinstance(layer, nn.Linear) or not is_plain(layer) or layer.weight.is_meta:
                raise ValueError(f"{at} is a {type(layer).__name__}, quantised or off-loaded: load adapters first")
        for at in adapters.scale:
            if at not in stack.before:
                stack.before[at] = self._layer(at).weight.detach().cpu().clone()

    @torch.no_grad()
    def _apply(self) -> None:
        """Weights of all layers that any adapters change: as they were, and what the active ones add."""
        stack = self._stack
        active = [] if stack.off else [(stack.loaded[name], scale) for name, scale in stack.scales.items() if scale]
        for at, total in stack.before.items():
            weight = self._layer(at).weight
            for adapters, scale in active:
                if at in adapters.scale:
                    total = total.to(weight.device, torch.float32) + adapters.delta(at, weight.device) * scale
            weight.data.copy_(total)
        if self._fast is not None:
            self._fast.refresh()


def _refuse_fused(stack: Stack) -> None:
    if stack.fused:
        raise ValueError("adapters are fused: call unfuse_lora, or unload_lora_weights to keep them in, first")


def _locate(path: str | Path, weight_name: str | None, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    """The folder or file of adapters; raises CheckpointError where there is none."""
    folder = loading.locate(path, lambda name, **how: snapshot_download(name, allow_patterns=_FILES, **how), **hub)
    folder = folder / subfolder if subfolder else folder
    return folder / weight_name if weight_name else folder


def add_adapters(pipeline: Adapters, path: str | Path, scale: float = 1.0) -> None:
    """Load adapters beside those that are active, with a scale; errors as of the pipeline's methods."""
    before = {} if pipeline._stack is None else pipeline._stack.loaded
    pipeline.load_lora_weights(path, f"{len(before)}: {path}", beside=scale)


def scheduler_config(model: Path, loras: Sequence[str | Path]) -> dict[str, Any]:
    """What decides how a checkpoint folder is sampled, under adapters if there are any; reads no weights.

    Raises CheckpointError for adapters that bring different samplers.
    """
    own = [config for path in loras if (config := own_config(Path(path))) is not None]
    if any(config != own[0] for config in own):
        raise CheckpointError(f"{', '.join(map(str, loras))}: they bring different samplers: leave all but one out")
    return own[0] if own else read_json(model / "scheduler" / _CONFIG)


def own_config(path: Path) -> dict[str, Any] | None:
    """The config of the sampler that adapters bring, None without one."""
    folder = path if path.is_dir() else path.parent
    return read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else None

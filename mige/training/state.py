"""What a run resumes from: trained parameters, moments and averages, each by name as one global tensor.

Saved and read by torch.distributed.checkpoint, so any number of processes resumes, whether each holds a whole tensor
(one process, DDP) or a shard of it (FSDP2). Frozen parameters are those that the run started from. There is no random
state: all that is drawn is a function of seed and step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from mige.training.ema import AveragedWeights

_STEPS = "averages_steps"


class TrainingState:
    """The live tensors of a run.

    Args:
        model: with the parameters as the optimisers have them, sharded or not.
        optimizers: of torch, or accelerate's wrappers of them.
        ema: averages of the trained parameters, in their order.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ema: AveragedWeights | None):
        self.model, self.trained = model, {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Noted now: while a step runs, a sharded model holds other parameters in their places.
        first = {id(p): name for name, p in self.trained.items()}
        every = model.named_parameters(remove_duplicate=False)
        self.aliases = {name: first[id(p)] for name, p in every if id(p) in first}  # tied ones have several names
        self.optimizers, self.ema = [getattr(one, "optimizer", one) for one in optimizers], ema

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, without copies; whole numbers as int64 []."""
        state = {f"parameters.{name}": p.detach() for name, p in self.trained.items()}
        names = {id(p): name for name, p in self.trained.items()}
        for optimizer in self.optimizers:
            for p, own in optimizer.state.items():
                for slot, value in own.items():
                    state[f"optimizer.{names[id(p)]}.{slot}"] = torch.as_tensor(value).detach()
        if self.ema is not None:
            state |= self._averages()
            state[_STEPS] = torch.tensor(self.ema.optimization_step)
        return state

    def _averages(self) -> dict[str, Tensor]:
        return {f"averages.{name}": average
                for name, average in zip(self.trained, self.ema.shadow_params, strict=True)}  # fmt: skip

    def load(self, folder: Path) -> None:
        """Read what `tensors` gave into its places; called by all processes.

        Raises ValueError naming what is missing or of another shape; torch's errors for files that cannot be read.
        """
        reader = dcp.FileSystemReader(folder)
        saved = reader.read_metadata().state_dict_metadata
        own = {f"parameters.{name}": p.detach() for name, p in self.trained.items()}
        if self.ema is not None:
            own |= self._averages() | {_STEPS: torch.tensor(0)}
        for name, tensor in own.items():
            shape = tuple(saved[name].size) if name in saved else "nothing"
            if shape != tuple(tensor.shape):
                raise ValueError(f"{name}: {shape} there, {tuple(tensor.shape)} expected")
        moments = {name: self._room(name, meta) for name, meta in saved.items() if name.startswith("optimizer.")}
        dcp.load(own | moments, storage_reader=reader, no_dist=not dist.is_initialized())
        self._give(moments)
        if self.ema is not None:
            self.ema.optimization_step = int(own[_STEPS])

    def untrained(self) -> dict[str, Tensor]:
        """The rest of the model's state dict, [...] each, copied where sharded; called by all processes."""
        rest = {name: value for name, value in self.model.state_dict().items() if name not in self.aliases}
        return {name: v.full_tensor().cpu() if isinstance(v, DTensor) else v for name, v in rest.items()}

    def read_weights(self, folder: Path) -> dict[str, Tensor]:
        """The averages that `tensors` gave, or else the parameters: by name, a tied one under each of its names.

        Read whole by one process from where they were saved, [...] each on the CPU in the parameter's dtype.
        """
        kind = "parameters" if self.ema is None else "averages"
        own = {f"{kind}.{name}": torch.empty(p.shape, dtype=p.dtype if self.ema is None else torch.float32)
               for name, p in self.trained.items()}  # fmt: skip
        dcp.load(own, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return {name: own[f"{kind}.{first}"].to(self.trained[first].dtype) for name, first in self.aliases.items()}

    def _room(self, name: str, saved: dcp.metadata.TensorStorageMetadata) -> Tensor:
        """Where a tensor of an optimiser is read to: sharded as its parameter, if it has its shape."""
        parameter = self.trained[name.removeprefix("optimizer.").rpartition(".")[0]].detach()
        dtype = saved.properties.dtype
        if saved.size and saved.size == parameter.shape:
            return torch.zeros_like(parameter, dtype=dtype)
        return torch.zeros(saved.size, dtype=dtype, device=parameter.device if saved.size else "cpu")

    def _give(self, moments: Mapping[str, Tensor]) -> None:
        """To the optimisers."""
        names = {id(p): name for name, p in self.trained.items()}
        slots: dict[str, dict] = {}
        for name, value in moments.items():
            parameter, _, slot = name.removeprefix("optimizer.").rpartition(".")
            whole = value.dtype is torch.int64 and not value.shape
            slots.setdefault(parameter, {})[slot] = int(value) if whole else value
        for optimizer in self.optimizers:
            state = optimizer.state_dict()
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            own = zip(numbers, (names.get(id(p)) for p in parameters), strict=True)
            state["state"] = {number: slots[name] for number, name in own if name in slots}
            optimizer.load_state_dict(state)


def share(state: Mapping[str, Tensor], rank: int, processes: int) -> dict[str, Tensor]:
    """What one process saves: its shards, and of the tensors that all hold about as many bytes as the others.

    state: tensors by name, [...] each, alike in all processes but for the shards.
    """
    loads, mine = [0] * processes, {}
    for name in sorted(state):
        tensor = state[name]
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        owner = loads.index(min(loads))
        loads[owner] += tensor.nbytes
        if owner == rank:
            mine[name] = tensor
    return mine

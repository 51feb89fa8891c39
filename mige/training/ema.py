"""Averaged weights of a model that may be sharded over processes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from mige.training.adamw import local

_TOGETHER = 64  # tensors a kernel: bfloat16 ones are copied to float32 that many at a time


class AveragedWeights(EMAModel):
    """diffusers' moving average, also of FSDP2's sharded parameters.

    It lies where the parameters lie, in float32: in bfloat16 its small changes would be lost. Saved are whole tensors,
    so any number of processes resumes from them.

    Args:
        parameters: those that train, as the optimiser has them. decay: share kept at a step (0..1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float):
        super().__init__(parameters, decay=decay, foreach=True)
        self.to(dtype=torch.float32)

    @torch.no_grad()
    def step(self, parameters: Sequence[nn.Parameter]) -> None:
        """Move every average towards its parameter by 1 - decay, in place: few kernels, and no copy of all averages.

        `parameters`: those that it was made of, in their order. The decay of the first steps is diffusers': at most
        (1 + step) / (10 + step).
        """
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for start in range(0, len(self.shadow_params), _TOGETHER):
            averages = [local(average) for average in self.shadow_params[start : start + _TOGETHER]]
            present = [local(p).float() for p in parameters[start : start + _TOGETHER]]  # a copy where they are half
            torch._foreach_lerp_(averages, present, 1 - self.cur_decay_value)

    @contextmanager
    def applied(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """The parameters hold the averages for a while, shard by shard; their own numbers wait in host memory."""
        places = [local(p.detach()) for p in parameters]
        own = [place.to("cpu", copy=True) for place in places]
        for place, average in zip(places, self.shadow_params, strict=True):
            place.copy_(local(average))
        try:
            yield
        finally:
            for place, before in zip(places, own, strict=True):
                place.copy_(before)

    def named(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> dict[str, Tensor | None]:
        """The averages by the parameters' names, whole and of the same shape, a tied one under each of its names.

        Called by all processes.
        """
        average = dict(zip(map(id, trained), self.whole(), strict=True))
        named = model.named_parameters(remove_duplicate=False)
        return {name: average[id(parameter)] for name, parameter in named if id(parameter) in average}

    def whole(self) -> list[Tensor | None]:
        """The averages, in the parameters' order and of the same shape; sharded ones gathered in host memory.

        Called by every process; None stands for what was gathered in all but the first, which alone writes files.
        """
        return [_gather(average) for average in self.shadow_params]

    def state_dict(self) -> dict:
        """For accelerate, which asks every process and lets the main one write."""
        return super().state_dict() | {"shadow_params": self.whole()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Read the averages into their present places and shards; raises ValueError for those of another model."""
        own = self.shadow_params
        super().load_state_dict(state_dict)
        read, self.shadow_params = self.shadow_params, own
        if [t.shape for t in read] != [t.shape for t in own]:
            raise ValueError(f"{len(read)} averaged weights, expected {len(own)} of this model's shapes")
        for average, whole in zip(own, read, strict=True):
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole.to(average.device), average.device_mesh, average.placements)
            average.copy_(whole)


def _gather(tensor: Tensor) -> Tensor | None:
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()  # by all processes together
    return whole.cpu() if dist.get_rank() == 0 else None

"""Averaged weights of a model that may be sharded over processes."""

from collections.abc import Iterable, Sequence

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor


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

"""The noise estimate of inference's third step, by the plain forward pass."""

from torch import Tensor

from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch, combine
from mige.diffusion.solver import Denoise
from mige.models.mige import MIGEModel


def guided_estimate(model: MIGEModel, condition: Condition, branches: list[Branch]) -> Denoise:
    """The guided noise estimate, float32 [B, 4, h, w]; `condition`: of all branches stacked."""

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        repeated = x_BCHW.repeat(len(branches), 1, 1, 1)
        output = model.denoise(repeated, t.expand(len(repeated)), condition)  # [branches * B, 8, h, w]
        return combine(output[:, : x_BCHW.shape[1]], branches)

    return denoise

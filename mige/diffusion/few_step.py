"""First-order steps at few time points, for models that were distilled to them; and what a step is taught to land on.

A few-step student is asked at the first N of the N + 1 points of `time_grid(N)` and steps from each to the next by its
estimate of x0, as DDIM does (arXiv 2010.02502, eq. 12, without noise). A solver of second order would look back to a
point that the student was not taught from.
"""

import torch
from diffusers import SchedulerMixin  # noqa: F401 - where diffusers loads a part of a folder, it looks for this beside it
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mige.diffusion.solver import Denoise, DPMSolver2M, Grid, OnStep, after_step, time_grid


def first_order_step(x_BCHW: Tensor, x0_BCHW: Tensor, grid: Grid, i: int) -> Tensor:
    """From time point i to i + 1 by an estimate of x0, both float [B, C, h, w]."""
    return _carry(grid, i) * x_BCHW + _gain(grid, i) * x0_BCHW


def x0_between(x_BCHW: Tensor, next_BCHW: Tensor, grid: Grid, i: int) -> Tensor:
    """The estimate of x0 by which `first_order_step` goes from x at point i to `next_BCHW` at point i + 1.

    All [B, C, h, w]. It is the target of progressive distillation (arXiv 2202.00512, appendix G).
    """
    return (next_BCHW - _carry(grid, i) * x_BCHW) / _gain(grid, i)


def _carry(grid: Grid, i: int) -> Tensor:
    return grid.sigma[i + 1] / grid.sigma[i]


def _gain(grid: Grid, i: int) -> Tensor:
    return -grid.alpha[i + 1] * torch.expm1(grid.lam[i] - grid.lam[i + 1])  # alpha' - alpha sigma' / sigma


@torch.no_grad()
def first_order_solver(denoise: Denoise, noise: Tensor, grid: Grid, on_step: OnStep | None = None) -> Tensor:
    """Noise, float32 [B, C, h, w], to the latent at the grid's last point; one network call a step.

    Arguments as in `dpm_solver_pp_2m`.
    """
    x = noise
    for i in range(len(grid.lam) - 1):
        x0 = (x - grid.sigma[i] * denoise(x, grid.model_time[i])) / grid.alpha[i]
        x = after_step(on_step, i, first_order_step(x, x0, grid, i), x0)
    return x


class FewStepSolver(DPMSolver2M):
    """The scheduler of a few-step student: the schedule and time points of `DPMSolver2M`, steps of first order.

    Its config travels in the checkpoint folder and says how the student is sampled (`mige.diffusion.settings`).

    Args:
        num_inference_steps: the steps it was distilled to, at least 1; taken where the caller names none.
        guidance_inside: whether guidance is in the weights. Then one branch is evaluated, and a caller's guidance
            refused.

    Raises ValueError for other values.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        num_inference_steps: int = 4,
        guidance_inside: bool = True,
    ):
        super().__init__(num_train_timesteps, beta_start, beta_end, beta_schedule, prediction_type, clip_sample)
        if type(num_inference_steps) is not int or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps!r}, expected a whole number of at least 1")
        if type(guidance_inside) is not bool:
            raise ValueError(f"guidance_inside is {guidance_inside!r}, expected true or false")
        self.register_to_config(_use_default_values=[])  # or another class's from_config would skip our defaults

    def sample(self, denoise: Denoise, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        """`first_order_solver` from `noise`, [B, C, h, w], in `steps` steps -> latents of that shape."""
        return first_order_solver(denoise, noise, time_grid(steps, self.betas, noise.device), on_step)

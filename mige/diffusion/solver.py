"""DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) on the continuous time the released model samples with.

Time runs from 1 to 1e-3 in equal steps, so the network is asked at non-integer times 999 ... 0. No library scheduler
can express that: the best stock setting differs by 5e-5 to 9e-4 (relative L2), this one by nothing. Any diffusers
scheduler can take its place (`run_scheduler`).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, C, h, w], model time as a 0-dim float tensor in 0..999) -> noise estimate like x."""

TRAINED_STEPS, TRAINED_BETAS = 1000, (1e-4, 0.02)
"""The noise schedule that MIGE models are trained on: so many betas, linear from the first to the last."""

FROM_CONFIG = "with from_config(pipeline.scheduler.config)"

OnStep = Callable[[int, Tensor, Tensor], Tensor | None]
"""(finished step 0..steps-1, x after it, its estimate of x0): for progress, previews; an exception stops sampling.

A tensor that it returns, of the shape of x, takes the place of x.
"""


@dataclass(frozen=True)
class Grid:
    """The noise schedule at the N + 1 time points of a run of N steps, float32 [N + 1]; float32 as released."""

    model_time: Tensor
    alpha: Tensor
    sigma: Tensor
    lam: Tensor


def time_grid(steps: int, betas: Tensor, device: torch.device | str = "cpu") -> Grid:
    """Schedule at `linspace(1, 1e-3, steps + 1)`.

    log(alpha) is interpolated linearly between the training times. `betas`: float64 [T]. Returns tensors float32
    [steps + 1]. The last point (model time 0) is arrived at but never evaluated. Raises ValueError if steps < 1.
    """
    _require_steps(steps)
    train_steps, log_alpha = len(betas), log_alphas(betas)
    train_time = torch.linspace(0, 1, train_steps + 1, dtype=torch.float32)[1:]
    time = torch.linspace(1, 1 / train_steps, steps + 1, dtype=torch.float32)
    left = (torch.searchsorted(train_time, time) - 1).clamp(0, train_steps - 2)
    share = (time - train_time[left]) * (log_alpha[left + 1] - log_alpha[left])
    log_alpha_t = log_alpha[left] + share / (train_time[left + 1] - train_time[left])
    alpha, sigma = log_alpha_t.exp(), (1 - (2 * log_alpha_t).exp()).sqrt()
    lam = log_alpha_t - 0.5 * torch.log(1 - (2 * log_alpha_t).exp())
    model_time = (time - 1 / train_steps) * train_steps
    return Grid(*(values.to(device) for values in (model_time, alpha, sigma, lam)))


def log_alphas(betas: Tensor) -> Tensor:
    """Log of alpha at the training times, float32 [T]; `betas`: [T]."""
    return (0.5 * torch.log(1 - betas.double()).cumsum(0)).float()


@torch.no_grad()
def dpm_solver_pp_2m(denoise: Denoise, noise: Tensor, grid: Grid, on_step: OnStep | None = None) -> Tensor:
    """Second-order multistep solver in data prediction, one network call a step.

    Args:
        denoise: the (guided) noise estimate.
        noise: float32 [B, C, h, w], standard normal.
        grid: from `time_grid`, on the device of `noise`.
        on_step: called after every step.

    Returns the latent at the grid's last time point (alpha 0.99995): no denoising to zero, no thresholding.
    """
    alpha, sigma, lam = grid.alpha, grid.sigma, grid.lam
    steps = len(lam) - 1
    x, x0_before = noise, None
    for i in range(steps):
        x0 = (x - sigma[i] * denoise(x, grid.model_time[i])) / alpha[i]
        h = lam[i + 1] - lam[i]
        phi = torch.expm1(-h)
        x_next = (sigma[i + 1] / sigma[i]) * x - (alpha[i + 1] * phi) * x0
        last_of_few = steps < 10 and i == steps - 1  # the released sampler ends short runs with a first-order step
        if x0_before is not None and not last_of_few:
            ratio = (lam[i] - lam[i - 1]) / h
            x_next = x_next - 0.5 * (alpha[i + 1] * phi) * ((1 / ratio) * (x0 - x0_before))
        x, x0_before = after_step(on_step, i, x_next, x0), x0
    return x


def after_step(on_step: OnStep | None, i: int, x: Tensor, x0: Tensor) -> Tensor:
    """Call `on_step`, if there is one, after step i; x [B, C, h, w], or what it puts in its place."""
    changed = None if on_step is None else on_step(i, x, x0)
    return changed if isinstance(changed, Tensor) else x


class DPMSolver2M(SchedulerMixin, ConfigMixin):
    """The solver above as the pipeline's `scheduler` part; its config can seed any diffusers scheduler.

    `EulerDiscreteScheduler.from_config(pipe.scheduler.config)` carries the noise schedule over, and with
    `clip_sample` that latents are not clipped as if they were pixels.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = TRAINED_STEPS,
        beta_start: float = TRAINED_BETAS[0],
        beta_end: float = TRAINED_BETAS[1],
        beta_schedule: str = "linear",
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
    ):
        if beta_schedule != "linear" or prediction_type != "epsilon":
            raise ValueError(f"expected linear betas and epsilon prediction, got {beta_schedule} and {prediction_type}")
        self.register_to_config(_use_default_values=[])  # or another class's from_config would skip our defaults
        self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)

    def sample(self, denoise: Denoise, noise: Tensor, steps: int, on_step: OnStep | None = None) -> Tensor:
        """Sample on this scheduler's own noise schedule (arXiv 2211.01095, algorithm 2).

        Args:
            denoise: the (guided) noise estimate of x, float [B, C, h, w], at a model time in 0..num_train_timesteps-1.
            noise: standard normal, float32 [B, C, h, w]; the schedule is put on its device.
            steps: network calls, at least 1.
            on_step: called after every step; an exception of it stops sampling.

        Returns the final latents, float32 [B, C, h, w], scaled as the VAE's latents are for the DiT.
        Raises ValueError if steps < 1.
        """
        return dpm_solver_pp_2m(denoise, noise, time_grid(steps, self.betas, noise.device), on_step)


@torch.no_grad()
def run_scheduler(
    scheduler: SchedulerMixin,
    denoise: Denoise,
    noise: Tensor,
    steps: int,
    generators: list[torch.Generator],
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with any diffusers scheduler that predicts epsilon (Euler, DDIM, UniPC, ...) in place of our solver.

    Args:
        denoise: the (guided) noise estimate of x, float [B, C, h, w], at a model time.
        noise: standard normal, float32 [B, C, h, w].
        steps: of the scheduler, at least 1.
        generators: on the CPU, one a sample; they feed the stochastic schedulers.

    Returns the final latents, float32 [B, C, h, w]. Raises ValueError for a scheduler that cannot sample (`why_not`)
    and for steps < 1.
    """
    _require_steps(steps)
    if reason := why_not(scheduler):
        raise ValueError(reason)
    accepted = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in accepted else {}
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * scheduler.init_noise_sigma
    for i, time in enumerate(scheduler.timesteps):
        eps = denoise(scheduler.scale_model_input(x, time), time.float())
        result = scheduler.step(eps, time, x, **extra)
        x = after_step(on_step, i, result.prev_sample, getattr(result, "pred_original_sample", result.prev_sample))
    return x


def sample(
    scheduler: SchedulerMixin,
    denoise: Denoise,
    noise: Tensor,
    steps: int,
    step_seeds: Sequence[int],
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with our solver or with any diffusers scheduler that predicts epsilon.

    Args:
        denoise: the (guided) noise estimate of x, float [B, C, h, w], at a model time.
        noise: standard normal, float32 [B, C, h, w].
        step_seeds: B of them, of what a stochastic scheduler draws at its steps.

    Returns the final latents, float32 [B, C, h, w]. Raises ValueError as `run_scheduler` does.
    """
    if isinstance(scheduler, DPMSolver2M):
        return scheduler.sample(denoise, noise, steps, on_step)
    generators = [torch.Generator().manual_seed(seed) for seed in step_seeds]
    return run_scheduler(scheduler, denoise, noise, steps, generators, on_step)


def model_times(scheduler: SchedulerMixin, steps: int) -> Tensor:
    """The model times that `sample` will ask for, float [steps] (more for a scheduler that asks twice a step)."""
    if isinstance(scheduler, DPMSolver2M):
        return time_grid(steps, scheduler.betas).model_time[:-1]
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float()


def why_not(scheduler: SchedulerMixin) -> str | None:
    """Why MIGE's latents cannot be sampled with it; None if they can.

    They can with a diffusion of epsilon on the noise schedule of training, stepped by (eps, t, x), that clips nothing.
    """
    name, wanted = type(scheduler).__name__, scheduler.config.get("prediction_type")
    if wanted != "epsilon":
        return f"MIGE predicts epsilon, {name} expects {wanted}"
    if isinstance(scheduler, DPMSolver2M):
        return _why_not_its_schedule(scheduler)
    lacks = [part for part in ("set_timesteps", "scale_model_input", "step", "init_noise_sigma")
             if not hasattr(scheduler, part)]  # fmt: skip
    if lacks:
        return f"{name} has no {lacks[0]}: expected a diffusion scheduler, such as EulerDiscreteScheduler"
    required = [p.name for p in inspect.signature(scheduler.step).parameters.values()
                if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]  # fmt: skip
    if len(required) > 3:
        return f"{name}.step also asks for {', '.join(required[3:])}: expected one stepped by estimate, time and sample"
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option):
            return f"{name} has {option}, which clips latents as if they were pixels: make it {FROM_CONFIG}"
    return _why_not_its_schedule(scheduler)


def _why_not_its_schedule(scheduler: SchedulerMixin) -> str | None:
    """What is wrong with a scheduler's noise schedule."""
    betas = getattr(scheduler, "betas", None)
    if not isinstance(betas, Tensor) or "beta_start" not in inspect.signature(type(scheduler)).parameters:
        return None  # of other families, such as consistency models', which tell no schedule to compare
    if len(betas) < 2:
        return f"its num_train_timesteps is {len(betas)}, expected at least 2"
    first, last = float(betas[0]), float(betas[-1])
    if not bool(((betas > 0) & (betas < 1)).all()):
        return f"its betas run from {float(betas.min()):g} to {float(betas.max()):g}, expected within 0 and 1"
    if last < first:
        return f"its betas fall from {first:g} to {last:g}, expected that noise grows"
    trained = torch.linspace(*TRAINED_BETAS, TRAINED_STEPS, dtype=torch.float64)
    if len(betas) != len(trained) or not torch.allclose(betas.double().cpu(), trained, rtol=1e-3):
        return (
            f"its noise schedule, {len(betas)} betas from {first:g} to {last:g}, is not the one that MIGE models are "
            f"trained on, 1000 linear betas from 0.0001 to 0.02: make it {FROM_CONFIG}"
        )
    return None


def _require_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"the sampler needs at least 1 step, got {steps}")

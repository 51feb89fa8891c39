"""The solver against closed forms and against diffusers' own schedulers."""

import itertools

import diffusers
import pytest
import torch
from golden import FIXTURES
from safetensors.torch import load_file

from mige.diffusion.solver import DPMSolver2M, Grid, dpm_solver_pp_2m, run_scheduler, time_grid

BETAS = DPMSolver2M().betas
GOLDEN = load_file(FIXTURES / "golden_tiny.safetensors")
MEAN, STD = 0.4, 0.7  # of the Gaussian data


def fixture_eps(x, t):
    return 0.98 * x - 0.05 * torch.cos(2 * x + 0.01 * t)


def exact_grid(steps: int) -> Grid:
    """The schedule of `time_grid`, computed anew in float64."""
    log_alpha = 0.5 * torch.log(1 - BETAS).cumsum(0)
    at = torch.linspace(999, 0, steps + 1, dtype=torch.float64)
    left = at.floor().long().clamp(max=998)
    log_alpha = log_alpha[left] + (at - left) * (log_alpha[left + 1] - log_alpha[left])
    alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
    return Grid(at, alpha, sigma, torch.log(alpha / sigma))


def gaussian_run(steps: int, x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """(the solver's end point, the exact one) for data N(MEAN, STD^2).

    Then x_t ~ N(alpha MEAN, var), var = alpha^2 STD^2 + sigma^2; the optimal eps is linear in x, and the probability
    flow keeps (x - alpha MEAN) / sqrt(var) constant.
    """
    var = grid.alpha**2 * STD**2 + grid.sigma**2
    where = {t.item(): i for i, t in enumerate(grid.model_time)}

    def eps(x, t):
        i = where[t.item()]
        return grid.sigma[i] * (x - grid.alpha[i] * MEAN) / var[i]

    exact = grid.alpha[-1] * MEAN + (var[-1] / var[0]).sqrt() * (x - grid.alpha[0] * MEAN)
    return dpm_solver_pp_2m(eps, x, grid), exact


def test_it_converges_to_the_exact_solution_with_second_order():
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 4, 4, 4)
    errors = []
    for steps in (100, 200, 400, 800):
        got, exact = gaussian_run(steps, x, exact_grid(steps))
        errors.append(((got - exact).norm() / exact.norm()).item())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[0] < 1e-2 and errors[-1] < 2e-4, errors
    assert all(3.4 < ratio < 4.6 for ratio in ratios), ratios


@pytest.mark.parametrize("steps, tolerance", [(20, 0.2), (50, 0.04), (60, 0.03)])
def test_samples_have_the_distribution_of_the_data(steps, tolerance):
    """In the float32 that is shipped, at the step counts that are used."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    got, exact = gaussian_run(steps, x, time_grid(steps, BETAS))
    assert (got - exact).norm() / exact.norm() < tolerance
    assert abs(got.mean() - MEAN) < tolerance and abs(got.std() - STD) < tolerance


@pytest.mark.parametrize("steps", [1, 7, 20, 333])
def test_the_grid_is_the_schedule_in_float32(steps):
    grid, exact = time_grid(steps, BETAS), exact_grid(steps)
    assert {values.dtype for values in vars(grid).values()} == {torch.float32}
    torch.testing.assert_close(grid.model_time.double(), exact.model_time, rtol=0, atol=2e-4)
    torch.testing.assert_close(grid.alpha.double(), exact.alpha, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grid.sigma.double(), exact.sigma, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(grid.lam.double(), exact.lam, rtol=0, atol=1e-3)
    assert (grid.lam.diff() > 0).all()


def test_one_step_is_one_ddim_step():
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    abar = torch.cumprod(1 - BETAS, 0)
    eps = fixture_eps(x.double(), 999.0)
    x0 = (x.double() - (1 - abar[-1]).sqrt() * eps) / abar[-1].sqrt()
    ddim = abar[0].sqrt() * x0 + (1 - abar[0]).sqrt() * eps
    got = DPMSolver2M().sample(fixture_eps, x, 1)
    assert (got - ddim).norm() / ddim.norm() < 1e-4


def test_the_first_step_is_first_order_and_the_later_ones_are_not():
    """Two steps as two DDIM steps differ from the multistep formula, except in a short run's last step."""
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for steps, last_is_first_order in ((9, True), (10, False)):
        grid, path = exact_grid(steps), []
        dpm_solver_pp_2m(fixture_eps, x, grid, lambda i, x, x0, path=path: path.append((x, x0)))
        starts = [x, *(x for x, _ in path[:-1])]
        is_ddim = []
        for i, (start, (end, x0)) in enumerate(zip(starts, path, strict=True)):
            eps = (start - grid.alpha[i] * x0) / grid.sigma[i]
            ddim = grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * eps
            is_ddim.append(bool((end - ddim).abs().max() < 1e-10))
        assert is_ddim == [True, *[False] * (steps - 2), last_is_first_order]


@pytest.mark.parametrize("steps", [0, -3])
def test_less_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"at least 1 step, got {steps}"):
        DPMSolver2M().sample(fixture_eps, torch.zeros(1, 4, 2, 2), steps)
    with pytest.raises(ValueError, match=f"at least 1 step, got {steps}"):
        run_scheduler(diffusers.DDIMScheduler(), fixture_eps, torch.zeros(1, 4, 2, 2), steps, [torch.Generator()])


@pytest.mark.parametrize("scheduler", [None, diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_on_step_is_called_once_a_step_in_order_and_can_stop(scheduler):
    ours, seen, calls = DPMSolver2M(), [], []

    class StopError(Exception):
        pass

    def denoise(x, t):
        calls.append(t.item())
        return fixture_eps(x, t)

    def sample(on_step):
        noise = GOLDEN["solver.z"]
        if scheduler is None:
            return ours.sample(denoise, noise, 6, on_step)
        return run_scheduler(scheduler.from_config(ours.config), denoise, noise, 6, [torch.Generator()], on_step)

    result = sample(lambda i, x, x0: seen.append((i, x, x0)))
    assert [i for i, _, _ in seen] == list(range(6)) and len(calls) == 6
    assert torch.equal(seen[-1][1], result) and all(x0.shape == result.shape for _, _, x0 in seen)

    def stop(i, x, x0):
        if i == 2:
            raise StopError

    calls.clear()
    with pytest.raises(StopError):
        sample(stop)
    assert len(calls) == 3


def foreign(cls, *, steps=50, noise=None, seeds=(0,), **changes):
    scheduler = cls.from_config(DPMSolver2M().config, **changes)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = GOLDEN["solver.z"] if noise is None else noise
    return run_scheduler(scheduler, fixture_eps, noise, steps, generators)


@pytest.mark.parametrize("steps", [20, 50, 60])
def test_the_best_stock_solver_of_diffusers_agrees(steps):
    """Only its rounding of the timesteps to integers is left."""
    got = foreign(
        diffusers.DPMSolverMultistepScheduler,
        steps=steps,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        timestep_spacing="linspace",
        final_sigmas_type="sigma_min",
        euler_at_final=False,
    )
    want = DPMSolver2M().sample(fixture_eps, GOLDEN["solver.z"], steps)
    assert 0 < (got - want).norm() / want.norm() < 1e-3


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_other_deterministic_schedulers_arrive_at_the_same_place(name):
    """So the noise schedule is carried over, and latents are not clipped as if they were pixels."""
    noise = GOLDEN["solver.z"]
    got, want = foreign(getattr(diffusers, name), steps=500), DPMSolver2M().sample(fixture_eps, noise, 500)
    assert want.abs().max() > 1.2
    assert (got - want).norm() / want.norm() < 0.03


def test_the_config_carries_every_value_over(tmp_path):
    """LCM's own defaults are another schedule; a fresh config and one from disk must both override them."""
    DPMSolver2M().save_pretrained(tmp_path)
    for config in (DPMSolver2M().config, DPMSolver2M.from_pretrained(tmp_path).config):
        other = diffusers.LCMScheduler.from_config(config)
        assert torch.allclose(other.betas.double(), BETAS, rtol=1e-5)
        assert other.config.clip_sample is False and other.config.prediction_type == "epsilon"


def test_a_stochastic_scheduler_draws_from_each_samples_generator():
    noise = GOLDEN["solver.z"][:1].repeat(3, 1, 1, 1)
    got = foreign(diffusers.DDPMScheduler, steps=5, noise=noise, seeds=(1, 2, 1))
    assert torch.equal(got[0], got[2]) and (got[0] - got[1]).abs().max() > 1e-3
    alone = foreign(diffusers.DDPMScheduler, steps=5, noise=noise[:1], seeds=(2,))
    torch.testing.assert_close(alone[0], got[1], rtol=1e-6, atol=1e-6)


def test_another_prediction_type_is_refused():
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="predicts epsilon, EulerDiscreteScheduler expects v_prediction"):
        run_scheduler(scheduler, fixture_eps, GOLDEN["solver.z"], 2, [torch.Generator()])
    with pytest.raises(ValueError, match="predicts epsilon"):  # it has no prediction type at all
        run_scheduler(
            diffusers.FlowMatchEulerDiscreteScheduler(), fixture_eps, GOLDEN["solver.z"], 2, [torch.Generator()]
        )
    for wrong in ({"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}):
        with pytest.raises(ValueError, match="expected linear betas and epsilon prediction"):
            DPMSolver2M(**wrong)

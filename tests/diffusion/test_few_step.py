"""Few first-order steps: node times, steps and their inverse in closed form, the settings a checkpoint brings along."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from mige.diffusion.few_step import FewStepSolver, first_order_solver, first_order_step, x0_between
from mige.diffusion.settings import WORLD, resolve
from mige.diffusion.solver import DPMSolver2M, time_grid
from mige.tasks import TASKS, Task

BETAS = FewStepSolver().betas
STUDENT = {"num_inference_steps": 4, "guidance_inside": True}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_model_is_asked_at_equal_distances_of_time(steps):
    asked = []

    def denoise(x, t):
        asked.append(float(t))
        return torch.zeros_like(x)

    FewStepSolver().sample(denoise, torch.zeros(1, 1, 2, 2), steps)
    assert asked == pytest.approx([999 - i * 999 / steps for i in range(steps)], abs=1e-3)


def test_every_node_is_a_point_of_a_teacher_whose_steps_are_a_multiple():
    student, teacher = time_grid(4, BETAS), time_grid(20, BETAS)
    for name in ("model_time", "alpha", "sigma", "lam"):
        torch.testing.assert_close(getattr(student, name), getattr(teacher, name)[::5], rtol=1e-4, atol=1e-4)


def test_a_step_is_ddim():
    """alpha' x0 + sigma' eps, with the x0 and eps that make up x."""
    grid, generator = time_grid(4, BETAS), torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 2, 2, generator=generator)
    for i in range(4):
        x = grid.alpha[i] * x0 + grid.sigma[i] * eps
        want = grid.alpha[i + 1] * x0 + grid.sigma[i + 1] * eps
        torch.testing.assert_close(first_order_step(x, x0, grid, i), want, rtol=1e-4, atol=1e-5)


def test_the_target_is_the_estimate_whose_step_lands_on_the_path():
    grid, generator = time_grid(4, BETAS.double()), torch.Generator().manual_seed(1)
    for i in range(4):
        x, after = torch.randn(2, 1, 3, 2, 2, generator=generator)
        torch.testing.assert_close(first_order_step(x, x0_between(x, after, grid, i), grid, i), after)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_exact_model_arrives_at_its_image(steps):
    """x = alpha x0 + sigma z at every point of the path, if the estimate of x0 is always x0."""
    x0, noise = torch.randn(2, 1, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    grid = time_grid(steps, BETAS)
    place = {float(t): i for i, t in enumerate(grid.model_time)}

    def denoise(x, t):
        i = place[float(t)]
        return (x - grid.alpha[i] * x0) / grid.sigma[i]

    seen = []
    got = first_order_solver(denoise, noise, grid, lambda i, x, estimate: seen.append((i, x, estimate)))
    eps = (noise - grid.alpha[0] * x0) / grid.sigma[0]
    torch.testing.assert_close(got, grid.alpha[-1] * x0 + grid.sigma[-1] * eps, rtol=1e-3, atol=1e-4)
    assert [i for i, _, _ in seen] == list(range(steps)) and torch.equal(seen[-1][1], got)
    torch.testing.assert_close(seen[0][2], x0, rtol=1e-2, atol=1e-2)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_the_config_travels_and_outlives_another_scheduler(tmp_path):
    FewStepSolver(num_inference_steps=2).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert (saved["num_inference_steps"], saved["guidance_inside"]) == (2, True)
    loaded = FewStepSolver.from_pretrained(tmp_path)
    for scheduler in (loaded, DDIMScheduler.from_config(loaded.config), DPMSolver2M.from_config(loaded.config)):
        how = resolve(scheduler.config, Task.EDIT)
        assert (how.steps, how.guidance, how.source_guidance) == (2, 1.0, 1.0)


@pytest.mark.parametrize("task", list(Task))
def test_a_student_evaluates_one_branch_of_everything_it_was_given(task):
    how = resolve(STUDENT, task)
    [branch] = how.branches
    assert (how.steps, branch.weight, branch.drop_text, branch.drop_source) == (4, 1.0, False, False)
    assert resolve(STUDENT, task, steps=2, guidance=1.0, source_guidance=1.0).steps == 2


@pytest.mark.parametrize("task", list(Task))
def test_any_other_checkpoint_is_sampled_as_before(task):
    official = TASKS[task]
    how = resolve(DPMSolver2M().config, task)
    assert (how.steps, how.guidance, len(how.branches)) == (official.steps, official.guidance, 2)
    how = resolve(DPMSolver2M().config, task, guidance=3.0, usual=WORLD)
    assert (how.steps, how.guidance, how.source_guidance) == (20, 3.0, 1.0)


@pytest.mark.parametrize("given", [{"guidance": 2.0}, {"guidance": 0.0}, {"source_guidance": 1.5}])
def test_another_guidance_beside_the_one_inside_is_refused(given):
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=rf"{name}_scale is {value:g}, but guidance is in the weights"):
        resolve(STUDENT, Task.EDIT, **given)


@pytest.mark.parametrize("value", [0, 4.0, True, "4"])
def test_a_number_of_steps_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"num_inference_steps is .*, expected a whole number of at least 1"):
        FewStepSolver(num_inference_steps=value)


def test_guidance_is_inside_or_it_is_not():
    with pytest.raises(ValueError, match="guidance_inside is 1, expected true or false"):
        FewStepSolver(guidance_inside=1)

"""AdamW with stochastic rounding: right in the mean, exact to resume, the same in a GPU's kernel and in plain torch."""

import functools
import io
import math
import os
import sys
from pathlib import Path

import pytest
import sharded_adamw
import torch
from accelerate import Accelerator
from conftest import ROOT
from processes import run_program, run_python

from mige.training import adamw
from mige.training.adamw import StochasticAdamW
from mige.training.clipping import clip_gradients, gradient_norm

BF16 = torch.bfloat16
OPTIONS = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-10, weight_decay=0.03)


def parameter(values: torch.Tensor, gradient: torch.Tensor | float = 0.0) -> torch.nn.Parameter:
    p = torch.nn.Parameter(values)
    p.grad = torch.zeros_like(values) + gradient
    return p


def model(dtype: torch.dtype = BF16) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [parameter(torch.randn(shape).to(dtype)) for shape in ((7, 24), (33,), (4, 3, 2, 2))]


def train(optimizer: torch.optim.Optimizer, parameters: list, steps: range) -> None:
    """Gradients and rates are functions of the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = (torch.randn(p.shape, generator=generator) * 1e-2).to(p.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 10
        optimizer.step()


def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [one[key] for one in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


def test_float32_weights_get_torchs_adamw():
    ours, theirs = model(torch.float32), model(torch.float32)
    train(StochasticAdamW(ours, **OPTIONS), ours, range(20))
    train(torch.optim.AdamW(theirs, **OPTIONS), theirs, range(20))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


def neighbours(x: float) -> tuple[float, float, float]:
    """The bfloat16 below and above in size, and how far x lies between them."""
    spacing = 2.0 ** (math.floor(math.log2(abs(x))) - 7)
    low = math.floor(abs(x) / spacing) * spacing
    return math.copysign(low, x), math.copysign(low + spacing, x), (abs(x) - low) / spacing


@pytest.mark.parametrize("weight, gradient", [(1.3, 0.02), (-0.7, 0.02), (1e-3, -3.0), (250.0, 1e-6)])
def test_weight_and_moments_are_rounded_to_a_neighbour_without_bias(weight, gradient):
    seeds, copies = 40, 5000
    weight, gradient = (float(torch.tensor(x, dtype=BF16)) for x in (weight, gradient))
    exact = torch.nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    exact.grad = torch.full_like(exact, gradient)
    reference = torch.optim.AdamW([exact], **OPTIONS)
    reference.step()
    want = [exact.item(), *(x.item() for x in states(reference))]
    got = [[], [], []]
    for seed in range(seeds):
        p = parameter(torch.full((copies,), weight, dtype=BF16), gradient)
        optimizer = StochasticAdamW([p], **OPTIONS, seed=seed)
        optimizer.step()
        for values, new in zip(got, (p.detach(), *states(optimizer)), strict=True):
            values.append(new.double())
    for values, x in zip(got, want, strict=True):
        low, high, share = neighbours(x)
        values = torch.stack(values)
        assert set(values.unique().tolist()) <= {low, high}
        z = ((values == high).double().mean() - share) / math.sqrt(share * (1 - share) / values.numel() + 1e-12)
        assert abs(z) < 5, (x, z)
    drawn = torch.stack([torch.stack(values).flatten() for values in got])
    if not (drawn == drawn[:, :1]).all(1).any():  # and not together: the three draws are independent
        assert (torch.corrcoef(drawn) - torch.eye(3)).abs().max() < 5 / math.sqrt(seeds * copies)


def test_bits_differ_between_steps_tensors_and_places():
    p, q = (parameter(torch.ones(100_000, dtype=BF16), 1.0) for _ in range(2))
    optimizer = StochasticAdamW([p, q], lr=2**-9, weight_decay=0.0)
    moved = []
    for _ in range(2):
        p.data.fill_(1), q.data.fill_(1)
        optimizer.step()
        moved += [(p != 1).double(), (q != 1).double()]
    moved = torch.stack([*moved, moved[0].roll(1)])
    torch.testing.assert_close(moved.mean(1), torch.full((5,), 0.5).double(), atol=0.01, rtol=0)  # half of 2^-8 below 1
    assert (torch.corrcoef(moved) - torch.eye(5)).abs().max() < 5 / math.sqrt(100_000)


def test_updates_far_below_the_spacing_move_the_weights_in_the_mean():
    ours, theirs = (parameter(torch.ones(20_000, dtype=BF16), 1e-3) for _ in range(2))
    options = dict(lr=1e-5, eps=1e-10, weight_decay=0.0)
    sgd = StochasticAdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(100):
        for optimizer in sgd:
            optimizer.step()
    assert (theirs == 1).all()  # rounded to the nearest, a thousand such steps are nothing
    assert ours.mean(dtype=torch.float64).item() == pytest.approx(1 - 100 * 1e-5, abs=5e-5)


def test_the_second_moment_shrinks_again():
    ours, theirs = (parameter(torch.ones(5000, dtype=BF16), 1.0) for _ in range(2))
    pair = StochasticAdamW([ours], lr=0.0), torch.optim.AdamW([theirs], lr=0.0)
    for p, optimizer in zip((ours, theirs), pair, strict=True):
        optimizer.step()
        p.grad.zero_()
        before = states(optimizer)[1].mean(dtype=torch.float64)
        for _ in range(400):
            optimizer.step()
        shrunk = (states(optimizer)[1].mean(dtype=torch.float64) / before).item()
        assert shrunk == pytest.approx(0.999**400 if p is ours else 1.0, abs=0.01)


def test_a_resumed_run_equals_an_uninterrupted_one():
    whole, cut = model(), model()
    optimizer = StochasticAdamW(whole, **OPTIONS, seed=3)
    train(optimizer, whole, range(12))
    first = StochasticAdamW(cut, **OPTIONS, seed=3)
    train(first, cut, range(5))
    file = io.BytesIO()
    torch.save({"weights": cut, "optimizer": first.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved["weights"]]
    second = StochasticAdamW(resumed, lr=9.0)
    second.load_state_dict(saved["optimizer"])
    train(second, resumed, range(5, 12))
    for a, b in zip([*whole, *states(optimizer)], [*resumed, *states(second)], strict=True):
        assert a.dtype == b.dtype == BF16 and torch.equal(a, b)
    assert second.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.processes
def test_shards_are_rounded_as_the_whole(tmp_path):
    """Three processes, one of which has nothing of the smallest tensor; norm and clipping too."""
    whole = sharded_adamw.parameters()
    optimizer = StochasticAdamW(whole, **sharded_adamw.OPTIONS)
    norms = sharded_adamw.train(optimizer, whole)
    script = ROOT / "tests" / "training" / "sharded_adamw.py"
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", script, tmp_path / "out.pt")
    assert run_python(*starter).returncode == 0
    there = torch.load(tmp_path / "out.pt", weights_only=True)
    for a, b in zip([*whole, *states(optimizer)], there["tensors"], strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    torch.testing.assert_close(torch.stack(norms), there["norms"], rtol=1e-6, atol=0)


def test_steps_of_torchs_adamw_are_read():
    p, q = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    ours, theirs = StochasticAdamW([p], **OPTIONS), torch.optim.AdamW([q], **OPTIONS)
    for optimizer, one in ((theirs, q), (ours, p)):
        train(optimizer, [one], range(3))
    ours.load_state_dict(theirs.state_dict())
    assert states(ours) and ours.state[p]["step"] == 3 and isinstance(ours.state[p]["step"], int)
    theirs.load_state_dict(ours.state_dict())
    train(theirs, [q], range(3, 4))
    assert theirs.state[q]["step"] == 4


def test_a_seed_decides_the_rounding():
    runs = [model() for _ in range(3)]
    for parameters, seed in zip(runs, (0, 0, 1), strict=True):
        train(StochasticAdamW(parameters, **OPTIONS, seed=seed), parameters, range(3))
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])


def test_scaling_on_the_fly_is_scaling_the_gradients():
    a, b = model(), model()
    first, second = StochasticAdamW(a, **OPTIONS), StochasticAdamW(b, **OPTIONS)
    for p, q in zip(a, b, strict=True):
        p.grad.normal_()
        q.grad.copy_(p.grad * 0.25)
    first.scale = torch.tensor(0.25)
    for _ in range(2):  # of one step only
        first.step()
        second.step()
        for q in b:
            q.grad.mul_(4)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_while_updating_is_clipping_before(max_norm):
    """In float32 bit for bit, the norm too; what follows is the gradients' own step again."""
    a, b = model(torch.float32), model(torch.float32)
    first, second = StochasticAdamW(a, **OPTIONS), StochasticAdamW(b, **OPTIONS)
    accelerator = Accelerator(cpu=True)
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        norm = clip_gradients(accelerator, [accelerator.prepare(first)], a, max_norm)
        assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(b, max_norm))
        first.step()
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and first.scale is None


def test_the_norm_of_bfloat16_gradients_is_summed_in_float32():
    parameters = model()
    for number, p in enumerate(parameters):
        p.grad.normal_(generator=torch.Generator().manual_seed(number))
    exact = sum(p.grad.double().square().sum() for p in parameters).sqrt()
    norm = gradient_norm(parameters)
    assert norm.dtype is torch.float32 and abs(norm / exact - 1) < 1e-6
    assert abs(torch.nn.utils.get_total_norm([p.grad for p in parameters]) / exact - 1) > 1e-4  # its own keeps 8 bits


def test_other_optimisers_have_their_gradients_clipped():
    parameters = model(torch.float32)
    for p in parameters:
        p.grad.normal_()
    accelerator, optimizer = Accelerator(cpu=True), torch.optim.AdamW(parameters)
    norm = clip_gradients(accelerator, [accelerator.prepare(optimizer)], parameters, 0.01)
    assert norm > 1 and gradient_norm(parameters) == pytest.approx(0.01, rel=1e-3)


def test_parameters_without_gradient_stay_and_transposed_gradients_count():
    idle, p, q = (parameter(torch.ones(4, 6, dtype=BF16)) for _ in range(3))
    idle.grad = None
    p.grad = torch.randn(6, 4).to(BF16).t()
    q.grad = p.grad.contiguous()
    optimizer, other = StochasticAdamW([idle, p], **OPTIONS), StochasticAdamW([idle, q], **OPTIONS)
    optimizer.step(), other.step()
    assert (idle == 1).all() and idle not in optimizer.state
    assert torch.equal(p, q)


@pytest.mark.parametrize("values", [torch.ones(4, 6, dtype=BF16).t(), torch.ones(3, dtype=torch.float16)])
def test_what_it_cannot_update_is_refused(values):
    with pytest.raises(ValueError, match="expected contiguous bfloat16 or float32"):
        StochasticAdamW([torch.nn.Parameter(values)], lr=1e-3)


def test_a_gradient_that_is_not_a_number_shows():
    p = parameter(torch.ones(64, dtype=BF16), float("nan"))
    StochasticAdamW([p], **OPTIONS).step()
    assert p.isnan().all()


def compare_kernel_with_plain(device: str) -> None:
    """Both updates of the same random rows; run by the tests below, on a CPU through Triton's interpreter."""
    shapes = ((3,), (50, 100), (2048,), (2049,)), ((8,), (64, 72))  # the second can be read 16 bytes at a time
    for dtype in (BF16, torch.float32):
        for some in shapes:
            for scale in (None, torch.tensor(0.37, device=device)):
                generator = torch.Generator().manual_seed(1)
                drawn = functools.partial(torch.rand, generator=generator)
                rows = [
                    (number, 96 * number, *(drawn(shape).mul(s).to(device, dtype) for s in (1.0, 1e-3, 1e-3, 1e-6)))
                    for number, shape in enumerate(some, start=5)
                ]
                copies = [(number, first, *(t.clone() for t in tensors)) for number, first, *tensors in rows]
                options = adamw.scalars(OPTIONS | {"seed": 5}, step=7)
                adamw.plain(rows, scale, **options)
                adamw.launch(copies, scale, **options)
                for (_, _, *want), (_, _, *got) in zip(rows, copies, strict=True):
                    for a, b in zip(want, got, strict=True):
                        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == BF16 else 1e-6, atol=1e-12)
                        assert dtype != BF16 or (a != b).float().mean() < 1e-3  # the same bits: else half would differ


@pytest.mark.processes
@pytest.mark.skipif(adamw.triton is None, reason="needs Triton")
def test_the_kernel_is_the_plain_update_interpreted():
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), str(here.parents[2])])
    code = "import test_optimizers; test_optimizers.compare_kernel_with_plain('cpu')"
    done = run_program(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_is_the_plain_update_on_a_gpu():
    compare_kernel_with_plain("cuda")

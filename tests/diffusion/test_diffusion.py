"""Noising and the hybrid loss, against a derivation in float64 that shares no code with them."""

import math

import numpy as np
import pytest
import torch

from mige.diffusion.gaussian import Diffusion, discretised_log_likelihood, normal_kl

BETA = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETA)
T = [0, 1, 2, 437, 999]


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch(times=T):
    """(network output [B, 8, 4, 4], x0, x_t, noise, t): x0 partly beyond +-1, v partly beyond +-1."""
    t = torch.tensor(times)
    x0, noise = random(len(times), 4, 4, 4, seed=1, scale=0.8), random(len(times), 4, 4, 4, seed=2)
    x_t = Diffusion().add_noise(x0, noise, t)
    eps = noise + random(len(times), 4, 4, 4, seed=3, scale=0.3)
    v = random(len(times), 4, 4, 4, seed=4, scale=0.7)
    return torch.cat([eps, v], dim=1), x0, x_t, noise, t


def posterior(x0: np.ndarray, x_t: np.ndarray, t: int) -> tuple[np.ndarray, float]:
    """Mean and variance of q(x_{t-1} | x_t, x0), by Bayes' rule from the two normals it is the product of.

    q(x_{t-1} | x0) = N(sqrt(abar_{t-1}) x0, 1 - abar_{t-1}) and q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta).
    """
    if t == 0:
        return x0, 0.0
    prior_precision = 1 / (1 - ABAR[t - 1])
    likelihood_precision = (1 - BETA[t]) / BETA[t]
    variance = 1 / (prior_precision + likelihood_precision)
    mean = variance * (prior_precision * np.sqrt(ABAR[t - 1]) * x0 + np.sqrt(1 - BETA[t]) / BETA[t] * x_t)
    return mean, variance


def reference_bound(output: np.ndarray, x0: np.ndarray, x_t: np.ndarray, t: int) -> float:
    """One sample's variational term in bits a dimension, straight from the definitions."""
    eps, v = output[:4], output[4:]
    log_var = [math.log(posterior(x0, x_t, max(t, 1))[1]), math.log(BETA[t])]  # the lower and the upper bound
    model_var = np.exp(log_var[0] + (v + 1) / 2 * (log_var[1] - log_var[0]))
    model_mean = posterior((x_t - np.sqrt(1 - ABAR[t]) * eps) / np.sqrt(ABAR[t]), x_t, t)[0]
    if t > 0:
        mean, variance = posterior(x0, x_t, t)
        kl = np.log(np.sqrt(model_var / variance)) + (variance + (mean - model_mean) ** 2) / (2 * model_var) - 0.5
        return kl.mean() / math.log(2)

    def below(x):
        z = (x - model_mean) / np.sqrt(model_var)
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    upper = np.where(x0 > 0.999, 1.0, below(x0 + 1 / 255))
    lower = np.where(x0 < -0.999, 0.0, below(x0 - 1 / 255))
    return -np.log(np.maximum(upper - lower, 1e-12)).mean() / math.log(2)


@pytest.mark.parametrize("t", T)
def test_the_loss_against_its_definition(t):
    output, x0, x_t, noise, times = batch([t, t])
    loss = Diffusion().loss(output, x0, x_t, noise, times)
    assert loss.mse.shape == loss.vb.shape == (2,) and loss.total.dtype == torch.float32
    for sample in range(2):
        double = [values[sample].double().numpy() for values in (output, x0, x_t, noise)]
        mse = ((double[3] - double[0][:4]) ** 2).mean()
        vb = reference_bound(*double[:3], t)
        assert loss.mse[sample].item() == pytest.approx(mse, rel=1e-5)
        assert loss.vb[sample].item() == pytest.approx(vb, rel=2e-3, abs=1e-5), t
        assert loss.total[sample].item() == pytest.approx(mse + vb, rel=2e-3)  # no 1/1000, no weighting


def test_a_mixed_batch_is_its_samples_one_by_one():
    output, x0, x_t, noise, t = batch()
    diffusion = Diffusion()
    whole = diffusion.loss(output, x0, x_t, noise, t)
    for i in range(len(t)):
        one = slice(i, i + 1)
        alone = diffusion.loss(output[one], x0[one], x_t[one], noise[one], t[one])
        torch.testing.assert_close(whole.mse[one], alone.mse, rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.vb[one], alone.vb, rtol=1e-6, atol=0)


def test_a_perfect_prediction_costs_nothing():
    """With the noise itself as estimate, and v = -1 (the posterior's variance), both terms vanish for t > 0."""
    _, x0, x_t, noise, t = batch([1, 10, 437, 999])
    loss = Diffusion().loss(torch.cat([noise, -torch.ones_like(noise)], 1), x0, x_t, noise, t)
    assert torch.equal(loss.mse, torch.zeros(4))
    assert loss.vb.abs().max() < 1e-4


def test_the_bound_teaches_v_alone():
    output, x0, x_t, noise, t = batch()
    output.requires_grad_()
    diffusion = Diffusion()
    (gradient,) = torch.autograd.grad(diffusion.loss(output, x0, x_t, noise, t).vb.sum(), output)
    assert not gradient[:, :4].any()
    assert (gradient[:, 4:].flatten(1).abs().sum(1) > 0).all() and gradient.isfinite().all()
    (gradient,) = torch.autograd.grad(diffusion.loss(output, x0, x_t, noise, t).mse.sum(), output)
    assert gradient[:, :4].any() and not gradient[:, 4:].any()


def test_half_precision_output_is_judged_in_float32():
    output, x0, x_t, noise, t = batch()
    half = output.bfloat16()
    got = Diffusion().loss(half, x0, x_t, noise, t)
    want = Diffusion().loss(half.float(), x0, x_t, noise, t)
    assert got.total.dtype == torch.float32 and torch.equal(got.total, want.total)


@pytest.mark.parametrize("t", T)
def test_noising_has_the_mean_and_variance_of_the_process(t):
    many = 200_000
    x0 = torch.full((1, 1, 1, many), 0.7)
    x_t = Diffusion().add_noise(x0, random(1, 1, 1, many), torch.tensor([t])).double()
    assert x_t.mean().item() == pytest.approx(0.7 * math.sqrt(ABAR[t]), abs=5 * math.sqrt(1 / many))
    assert x_t.var().item() == pytest.approx(1 - ABAR[t], rel=0.02)


def test_noising_step_by_step_arrives_at_the_same_variance():
    """alpha at t is what the betas up to it leave; from the definition of the chain, not from the tables."""
    signal, variance = 1.0, 0.0
    for beta in BETA[:438]:
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
    x0, noise = torch.tensor([[1.0, 0.0]]).reshape(1, 2, 1, 1), torch.tensor([[0.0, 1.0]]).reshape(1, 2, 1, 1)
    got = Diffusion().add_noise(x0, noise, torch.tensor([437])).flatten()
    assert got.tolist() == pytest.approx([signal, math.sqrt(variance)], rel=1e-6)


def test_the_ends_of_the_schedule():
    diffusion, ends = Diffusion(), torch.tensor([0, 999])
    alpha, sigma = (diffusion.at(name, ends).flatten() for name in ("sqrt_abar", "sqrt_one_minus_abar"))
    assert alpha.tolist() == pytest.approx([math.sqrt(1 - 1e-4), math.sqrt(ABAR[-1])], rel=1e-6)
    assert sigma.tolist() == pytest.approx([1e-2, math.sqrt(1 - ABAR[-1])], rel=1e-6)
    assert alpha[1] < 0.01 and sigma[1] > 0.9999  # all but pure noise
    assert all(table.isfinite().all() and len(table) == 1000 for table in diffusion.tables.values())
    lower = diffusion.at("log_variance", torch.arange(1000)).flatten()
    upper = diffusion.at("log_beta", torch.arange(1000)).flatten()
    assert (lower[1:] < upper[1:]).all() and lower[0] == lower[1]
    x0 = random(2, 4, 2, 2)
    assert torch.equal(diffusion.add_noise(x0, torch.zeros_like(x0), ends)[0], alpha[0] * x0[0])


def test_weights_of_the_loss():
    t = torch.tensor(T)
    snr = ABAR[T] / (1 - ABAR[T])
    weight = Diffusion().weight
    assert weight(t).tolist() == [1.0] * len(T)
    assert weight(t, gamma=5.0).tolist() == pytest.approx(np.minimum(snr, 5) / snr, rel=1e-6)  # arXiv 2303.09556
    assert weight(t, power=0.5).tolist() == pytest.approx(np.where(snr < 1, snr**-0.5, 1), rel=1e-6)
    assert weight(t, gamma=5.0, power=1.0).tolist() == pytest.approx(np.minimum(snr, 5) / snr / np.minimum(snr, 1))
    assert weight(t, gamma=5.0, power=0.5).dtype == torch.float32


def test_at_power_one_and_much_noise_the_error_of_the_image_counts():
    output, x0, x_t, noise, t = batch([500, 800, 999])
    eps = output[:, :4]
    diffusion = Diffusion()
    x0_hat = diffusion.at("sqrt_recip_abar", t) * x_t - diffusion.at("sqrt_recip_abar_minus_one", t) * eps
    weighted = diffusion.weight(t, power=1.0) * (eps - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted, (x0_hat - x0).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_other_betas():
    short = Diffusion(torch.tensor([0.5, 0.75], dtype=torch.float64))
    got = short.add_noise(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])).flatten()
    assert got.tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.125)])


def test_the_divergence_of_normals_by_numerical_integration():
    x = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    for m1, v1, m2, v2 in [(0.0, 1.0, 0.0, 1.0), (0.3, 0.5, -1.0, 2.0), (2.0, 3.0, 1.0, 0.7)]:
        p, q = (torch.distributions.Normal(torch.tensor(m).double(), math.sqrt(v)) for m, v in ((m1, v1), (m2, v2)))
        want = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
        got = normal_kl(*(torch.tensor(value).double() for value in (m1, math.log(v1), m2, math.log(v2))))
        assert got.item() == pytest.approx(want.item(), abs=1e-6)


def test_the_bins_of_the_discretised_likelihood_add_up_to_one():
    centres = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, log_std in [(0.0, -1.0), (0.9, -3.0), (-1.2, 0.0), (0.2, -5.0)]:
        log_p = discretised_log_likelihood(centres, torch.tensor(mean).double(), torch.tensor(log_std).double())
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)
    narrow = discretised_log_likelihood(*(torch.tensor(value).double() for value in (0.5, 0.5, -12.0)))
    far = discretised_log_likelihood(*(torch.tensor(value).double() for value in (0.5, -0.5, -12.0)))
    assert narrow.item() == pytest.approx(0, abs=1e-9) and far.item() == pytest.approx(math.log(1e-12))

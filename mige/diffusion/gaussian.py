"""The forward diffusion process and the hybrid training loss.

Equation numbers: [DDPM] arXiv 2006.11239, [iDDPM] arXiv 2102.09672. Letters: B samples, C latent channels, T = 1000.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Per-sample terms, float32 [B]; the training loss is `total.mean()`."""

    mse: Tensor
    vb: Tensor

    @property
    def total(self) -> Tensor:
        """mse + vb, [B], with no 1/1000 on vb and no SNR weighting: as the released model was trained."""
        return self.mse + self.vb


class Diffusion:
    """Linear-beta schedule of T steps; tables in float64, gathered as float32.

    Args:
        betas: float64 [T], by default `linspace(1e-4, 0.02, 1000)`.
    """

    def __init__(self, betas: Tensor | None = None):
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if betas is None else betas.double()
        abar = torch.cumprod(1 - beta, 0)
        abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
        variance = beta * (1 - abar_prev) / (1 - abar)  # [DDPM] eq. 7
        self.tables = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_one_minus_abar": (1 - abar).sqrt(),
            "sqrt_recip_abar": (1 / abar).sqrt(),
            "sqrt_recip_abar_minus_one": (1 / abar - 1).sqrt(),
            "log_beta": beta.log(),
            "log_variance": torch.cat([variance[1:2], variance[1:]]).log(),  # entry 0 would be log 0
            "mean_x0": beta * abar_prev.sqrt() / (1 - abar),  # [DDPM] eq. 7, coefficient of x0
            "mean_xt": (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar),  # ... and of x_t
        }

    def at(self, name: str, t_B: Tensor) -> Tensor:
        """A table's values at integer times [B], as float32 [B, 1, 1, 1]."""
        return self._on(t_B.device)[name][t_B].float().reshape(-1, 1, 1, 1)

    @functools.cache  # noqa: B019 - copying at each use would wait for the GPU's queue; a run has one Diffusion
    def _on(self, device: torch.device) -> dict[str, Tensor]:
        return {name: table.to(device) for name, table in self.tables.items()}

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t from scaled latents and normal noise, float [B, C, h, w]; t: int64 [B] in 0..T-1. [DDPM] eq. 4."""
        return self.at("sqrt_abar", t_B) * x0_BCHW + self.at("sqrt_one_minus_abar", t_B) * noise_BCHW

    def weight(self, t_B: Tensor, gamma: float | None = None, power: float = 0.0) -> Tensor:
        """`snr_weight` at integer times [B], float32 [B]."""
        abar = self._on(t_B.device)["sqrt_abar"][t_B].square()
        return snr_weight(abar / (1 - abar), gamma, power)

    def loss(self, output_BCHW: Tensor, x0_BCHW: Tensor, x_t_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Loss:
        """Hybrid loss of the network's output [B, 2C, h, w] (noise estimate, variance interpolation v). [iDDPM] eq. 16.

        The variational term teaches v alone: the noise estimate is detached in it.
        """
        eps, v = output_BCHW.float().chunk(2, dim=1)
        mse = (noise_BCHW - eps).square().mean(dim=(1, 2, 3))  # [DDPM] eq. 14
        return Loss(mse, self._variational_bound(eps.detach(), v, x0_BCHW, x_t_BCHW, t_B))

    def _variational_bound(self, eps: Tensor, v: Tensor, x0: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """One term of the bound, in bits a dimension, [B]: KL for t > 0, discretised likelihood for t = 0."""
        share = (v + 1) / 2
        true_log_var = self.at("log_variance", t_B)
        log_var = share * self.at("log_beta", t_B) + (1 - share) * true_log_var  # [iDDPM] eq. 15
        x0_hat = self.at("sqrt_recip_abar", t_B) * x_t - self.at("sqrt_recip_abar_minus_one", t_B) * eps
        true_mean, mean = (self.at("mean_x0", t_B) * x + self.at("mean_xt", t_B) * x_t for x in (x0, x0_hat))
        kl = normal_kl(true_mean, true_log_var, mean, log_var)  # [DDPM] eq. 5
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_var)  # [DDPM] eq. 13
        per_dimension = torch.where((t_B == 0).reshape(-1, 1, 1, 1), nll, kl)
        return per_dimension.mean(dim=(1, 2, 3)) / math.log(2)


def snr_weight(snr_B: Tensor, gamma: float | None = None, power: float = 0.0) -> Tensor:
    """Weights of losses by the signal-to-noise ratio of their samples, float32 [B]; 1 by the defaults.

    min(SNR, gamma) / SNR (arXiv 2303.09556, for noise estimates), so that little noise does not rule the loss, times
    max(1, SNR ** -power): the error of a noise estimate, which falls as SNR, must not hide what much noise decides,
    namely what is drawn and where. At power 1 the error of the image counts there.
    """
    little_noise = torch.ones_like(snr_B) if gamma is None else (gamma / snr_B).clamp(max=1)
    much_noise = (snr_B**-power).clamp(min=1)
    return (little_noise * much_noise).float()


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, exp log_var1) || N(mean2, exp log_var2)) in nats, elementwise ([DDPM] eq. 5, each of its terms).

    All four are float tensors of shapes that broadcast; log_var is the natural logarithm of a variance. Returns a
    tensor of the broadcast shape, at least 0 but for rounding.
    """
    spread = torch.exp(log_var1 - log_var2) + (mean1 - mean2).square() * torch.exp(-log_var2)
    return 0.5 * (-1 + log_var2 - log_var1 + spread)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log probability in nats of the bin of width 2/255 around x under a normal, elementwise ([DDPM] eq. 13).

    Args:
        x: float, values in [-1, 1]; the outermost bins (beyond +-0.999) are open.
        mean, log_std: of the normal, float, of shapes that broadcast with x; log_std is the natural logarithm.

    Returns a tensor of the broadcast shape, between log 1e-12 and 0.

    The normal's cdf is taken by its tanh approximation and logarithms are clamped at 1e-12, as in training.
    """
    scale = torch.exp(-log_std)
    upper, lower = (_approximate_cdf(scale * (x - mean + edge)) for edge in (1 / 255, -1 / 255))
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()


def _approximate_cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

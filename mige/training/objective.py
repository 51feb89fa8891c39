"""What a micro-batch is trained on: the released model's noise estimates here, a student's segments in distillation.py.

Letters: B samples, K noise levels of each; the first level of all samples comes first.
"""

from dataclasses import dataclass
from typing import Protocol

from diffusers import AutoencoderKL
from torch import Tensor, nn

from mige.data.batch import TrainingBatch
from mige.diffusion.gaussian import Diffusion, Loss


@dataclass(frozen=True)
class Judged:
    """The losses of a micro-batch, float32 [K B], what each weighs, and the model time it was asked at, 0..999."""

    loss: Loss
    weight_B: Tensor
    time_B: Tensor

    def mean(self) -> Tensor:
        """What is learnt from: the weighted mean, float32 []."""
        return (self.loss.total * self.weight_B).mean()


class Objective(Protocol):
    """Losses of a batch as a function of the trained module and the batch alone, so that a resumed run is the same.

    Attributes:
        levels: K.
        frozen_passes: forward passes of the DiT a sample that nothing is learnt through, for the count of FLOPs.
    """

    levels: int
    frozen_passes: int

    def __call__(self, model: nn.Module, vae: AutoencoderKL, batch: TrainingBatch, autocast) -> Judged:
        """`model`: the wrapped `MIGEModel`; `autocast`: accelerate's, as a function that makes the context."""


class NoiseObjective:
    """The noise in x_t estimated at random times: the hybrid loss (`Diffusion.loss`), weighted as the config says."""

    frozen_passes = 0

    def __init__(self, diffusion: Diffusion, levels: int, snr_gamma: float | None, snr_power: float):
        self.diffusion, self.levels, self.snr_gamma, self.snr_power = diffusion, levels, snr_gamma, snr_power

    def __call__(self, model: nn.Module, vae: AutoencoderKL, batch: TrainingBatch, autocast) -> Judged:
        x0, references, source = batch.latents(vae)
        x0 = x0.repeat(self.levels, 1, 1, 1)
        x_t = self.diffusion.add_noise(x0, batch.noise_BCHW, batch.time_B)
        with autocast():
            output = model(
                x_t,
                batch.time_B.float(),
                batch.instructions,
                batch.vision_RCHW,
                references,
                source,
                batch.drop_text_B,
                batch.drop_source_B,
            )
        loss = self.diffusion.loss(output, x0, x_t, batch.noise_BCHW, batch.time_B)
        return Judged(loss, self.diffusion.weight(batch.time_B, self.snr_gamma, self.snr_power), batch.time_B)

"""A few-step student of guided sampling, trained by the trainer like any other model.

The teacher, a frozen copy of the DiT, samples from noise: guided, `teacher_steps` steps of its own solver.
The student is asked at N points of that path, at equal distances of time, without guidance, and its estimate of x0 is
pulled to the one whose first-order step lands on the next of the N points. So N steps of one branch follow the
teacher's path of many steps of two. The encoder is shared and frozen, and the target images are not looked at.

It is progressive distillation (Salimans and Ho, arXiv 2202.00512, appendix G) with the guidance inside (Meng et al.,
arXiv 2210.03142), from the teacher's many steps to N at once and on the teacher's own paths from noise, as Luhman and
Luhman (arXiv 2101.02388) do for a single step and PeRFlow (arXiv 2405.07510) for pieces that start at noised data.

Letters: B samples, N steps of the student; latents are [B, 4, h, w].
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mige.checkpoints.lora import fingerprint
from mige.config import Config, ConfigError
from mige.data.batch import TrainingBatch
from mige.diffusion.conditioning import Condition
from mige.diffusion.few_step import FewStepSolver, x0_between
from mige.diffusion.gaussian import Loss, snr_weight
from mige.diffusion.guidance import Guidance, branches
from mige.diffusion.solver import DPMSolver2M, time_grid
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import SampleNoise
from mige.models.mige import MIGEModel
from mige.tasks import Task
from mige.training.objective import Judged
from mige.training.trainer import Trainer


@dataclass(frozen=True)
class Segments:
    """The student's questions about a batch, the first step of all samples first: [N B, ...].

    Attributes:
        x_BCHW: points of the teacher's path, float32. x0_BCHW: the estimates of x0 that lead from each to the next.
        time_B: model times. ratio_B: alpha / sigma there, the root of the signal-to-noise ratio.
    """

    x_BCHW: Tensor
    x0_BCHW: Tensor
    time_B: Tensor
    ratio_B: Tensor


def cut(points: Sequence[Tensor], solver: DPMSolver2M) -> Segments:
    """The teacher's path at the N + 1 points of `time_grid(N)`, noise first, [B, 4, h, w] each -> N segments."""
    steps, first = len(points) - 1, points[0]
    grid = time_grid(steps, solver.betas, first.device)
    targets = [x0_between(points[i], points[i + 1], grid, i) for i in range(steps)]
    time, ratio = (values[:-1].repeat_interleave(len(first)) for values in (grid.model_time, grid.alpha / grid.sigma))
    return Segments(torch.cat(list(points[:-1])), torch.cat(targets), time, ratio)


class SegmentObjective:
    """The losses of a student at the N points of its teacher's paths; no chance but the batch's own noise.

    Args:
        teacher: the teacher's pipeline. encoder: the student as a whole, whose encoder is the teacher's too.
        steps: N. teacher_steps: of its solver, a multiple of N. guidance: of every sample of a batch.
        snr_gamma, snr_power: the loss is the error of the noise estimate, weighted as in `Diffusion.weight`. At power 1
            that is the error of x0, and the first point, whose estimate of x0 matters least, rules the gradient; at 1/2
            it is about the error of where the step lands, which is the default.
    """

    def __init__(
        self,
        teacher: MIGEPipeline,
        encoder: MIGEModel,
        steps: int,
        teacher_steps: int,
        guidance: Guidance,
        snr_gamma: float | None,
        snr_power: float,
    ):
        self.teacher, self.encoder, self.guidance = teacher, encoder, guidance
        self.levels, self.teacher_steps = steps, teacher_steps
        self.snr_gamma, self.snr_power = snr_gamma, snr_power
        self.frozen_passes = teacher_steps * len(branches(guidance.task, guidance.text, guidance.source))

    def __call__(self, model: nn.Module, vae: AutoencoderKL, batch: TrainingBatch, autocast) -> Judged:
        _, references, source = batch.latents(vae)
        noise = batch.noise_BCHW[: len(batch.instructions)]  # of the first of the config's noise levels
        with torch.no_grad(), autocast():
            self.encoder.encoder.eval()  # as at inference, without dropout, whatever mode the trainer has it in
            condition = self.encoder.encode(batch.instructions, batch.vision_RCHW, references, source)
        segments = cut(self._path(condition, noise), self.teacher.scheduler)
        with autocast():
            output = model(segments.x_BCHW, segments.time_B, condition=condition)
        return self.judge(output, segments)

    def judge(self, output_BCHW: Tensor, segments: Segments) -> Judged:
        """The student's output, [N B, 8, h, w], of which the noise estimate alone is taught."""
        eps, ratio = output_BCHW.float().chunk(2, dim=1)[0], segments.ratio_B.reshape(-1, 1, 1, 1)
        alpha, sigma = ratio / (1 + ratio.square()).sqrt(), 1 / (1 + ratio.square()).sqrt()
        wanted = (segments.x_BCHW - alpha * segments.x0_BCHW) / sigma
        mse = (wanted - eps).square().mean(dim=(1, 2, 3))
        weight = snr_weight(segments.ratio_B.square(), self.snr_gamma, self.snr_power)
        return Judged(Loss(mse, torch.zeros_like(mse)), weight, segments.time_B)

    def _path(self, condition: Condition, noise_BCHW: Tensor) -> list[Tensor]:
        """The teacher's guided path from noise, at N + 1 of its points."""
        points, every = [noise_BCHW.float()], self.teacher_steps // self.levels

        def keep(step: int, x: Tensor, x0: Tensor) -> None:
            if (step + 1) % every == 0:
                points.append(x)

        noise = [SampleNoise(latent, (), latent, 0) for latent in points[0]]
        self.teacher.denoise(condition, noise, self.guidance, steps=self.teacher_steps, on_step=keep)
        return points


class DistillationTrainer(Trainer):
    """The trainer of a student; `config.distillation` says how many steps of what it is taught.

    Its checkpoints hold the student with its `FewStepSolver`: as `model/`, or with LoRA as `lora/`.
    """

    def __init__(self, config: Config, run: Path, resume: Path | None = None):
        check(config)
        super().__init__(config, run, resume)
        if self.sharding != "none":
            raise ConfigError(f"a student is not sharded by {self.sharding}: launch it on one GPU or with DDP")

    def _make_objective(self) -> SegmentObjective:
        how, settings, pipeline = self.config.distillation, self.config.train, self.pipeline
        if type(pipeline.scheduler) is not DPMSolver2M:
            raise ConfigError(
                f"{settings.pretrained} samples with {type(pipeline.scheduler).__name__}, expected a teacher that "
                "samples with DPMSolver2M: a student cannot be distilled again"
            )
        teacher = copy.deepcopy(pipeline.transformer).requires_grad_(False).eval().to(self.device)
        if self.accelerator.mixed_precision == "bf16":
            teacher = teacher.to(torch.bfloat16)
        teacher = MIGEPipeline(**(pipeline.components | {"transformer": teacher}))
        teacher.set_progress_bar_config(disable=True)
        if self.device.type == "cuda":
            teacher.compile()  # three small kernels to wait for
        pipeline.scheduler = FewStepSolver(num_inference_steps=how.steps)  # exported with the student
        # Of all tasks at once: where there is no source, two of an edit's three branches are one.
        guidance = Guidance(Task.EDIT, how.guidance, how.source_guidance)
        weighting = settings.snr_gamma, settings.snr_power
        return SegmentObjective(teacher, self.plain, how.steps, how.teacher_steps, guidance, *weighting)

    def _invariants(self, saved: Mapping[str, Any] | None = None) -> dict:
        """Another teacher would be followed from here on."""
        return super()._invariants(saved) | {"teacher": fingerprint(self.objective.teacher.transformer)}

    def _export(self, folder: Path) -> Callable[[], None]:
        write = super()._export(folder)
        if self.config.train.trainable == "lora" and self.accelerator.is_main_process:
            self.pipeline.scheduler.save_config(folder / "lora")
        return write


def check(config: Config) -> None:
    """Raise ConfigError for a config that describes no distillation."""
    if config.distillation is None:
        raise ConfigError("the config has no section distillation: start from configs/distill.py, or use train_mige.py")
    if config.train.pretrained is None:
        raise ConfigError("train.pretrained is None, expected the teacher's checkpoint folder")
    if config.train.trainable not in ("dit", "lora"):
        raise ConfigError(
            f"train.trainable is {config.train.trainable!r}, expected 'dit' or 'lora': a student shares its "
            "teacher's encoder"
        )
    if other := [name for name in config.train.lora_targets if not name.startswith("dit_")]:
        raise ConfigError(f"train.lora_targets has {other[0]!r}, expected the DiT's: a student shares the encoder")
    if config.train.held_out:
        raise ConfigError("train.held_out is set, but a student does not learn to estimate noise: leave it empty")
    for name in ("drop_text", "drop_source", "drop_both"):
        if getattr(config.data, name):
            raise ConfigError(f"data.{name} is {getattr(config.data, name)}, expected 0: a student has one branch")

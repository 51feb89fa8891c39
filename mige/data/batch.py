"""Samples of training, and batches of them.

Letters: B samples, R references of all samples, P = B + R images, K noise levels, C channels; latents are [4, h, w].
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mige.data.records import BadRecordsError, count
from mige.models.instruction import Instruction
from mige.models.vae import Moments, encode, scale
from mige.tasks import PLACEHOLDER, Task


@dataclass(frozen=True)
class TrainingSample:
    """One sample before any network. Its images are the target, then the references.

    Either `pixels` (float32 [1 + R, 3, H, W] in [-1, 1]) or `moments` (of [1 + R, 4, h, w]) is given; neither, nor
    `vision`, where the images are drawn on the device.
    """

    id: str
    where: str  # file and record, for messages
    task: Task
    source: int | None  # which reference is the image to edit
    instruction: Instruction
    vision: Tensor | None  # float32 [R, 3, 224, 224]
    pixels: Tensor | None
    moments: Moments | None
    noise: Tensor  # float32 [K, 4, h, w], of the diffusion, at K noise levels
    posterior: Tensor  # float32 [1 + R, 4, h, w]: the VAE posterior's noise of every image
    source_posterior: Tensor  # float32 [4, h, w]: of the source
    times: tuple[int, ...]  # K of them
    drop_text: bool
    drop_source: bool


@dataclass(frozen=True)
class TrainingBatch:
    """B samples, R references and P = B + R images, collated; `latents` makes the rest.

    Attributes:
        pixels_PCHW, moments, vision_RCHW: as in `TrainingSample`.
        task_B: int64, places in `Task`.
        target_B, reference_R, source_B: int64, places in the row of images; a sample without a source has -1.
        noise_BCHW, time_B: K noise levels of every sample, the first of all samples first: [K B, ...].
    """

    ids: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    vision_RCHW: Tensor | None
    pixels_PCHW: Tensor | None
    moments: Moments | None
    noise_BCHW: Tensor
    posterior_PCHW: Tensor
    source_posterior_BCHW: Tensor
    task_B: Tensor
    target_B: Tensor
    reference_R: Tensor
    source_B: Tensor
    time_B: Tensor
    drop_text_B: Tensor
    drop_source_B: Tensor

    def to(self, device: torch.device) -> "TrainingBatch":
        """All tensors on the device."""
        moved = {f.name: _move(getattr(self, f.name), lambda t: t.to(device, non_blocking=True)) for f in fields(self)}
        return TrainingBatch(**moved)

    def pin_memory(self) -> "TrainingBatch":
        """Called by the data loader, for fast copies to a GPU."""
        return TrainingBatch(**{f.name: _move(getattr(self, f.name), Tensor.pin_memory) for f in fields(self)})

    def latents(self, vae: AutoencoderKL) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled targets x0 [B, 4, h, w], unscaled references [R, 4, h, w], scaled sources [B, 4, h, w] (or zeros)."""
        moments = self.moments
        if moments is None:
            with torch.no_grad():
                moments = encode(vae, self.pixels_PCHW)
                moments = Moments(moments.mean.float(), moments.std.float())
        unscaled_PCHW = moments.sample(self.posterior_PCHW)
        place_B = self.source_B.clamp(min=0)
        sources = Moments(moments.mean[place_B], moments.std[place_B]).sample(self.source_posterior_BCHW)
        has_source = (self.source_B >= 0).reshape(-1, 1, 1, 1)
        return (
            scale(vae, unscaled_PCHW[self.target_B]),
            unscaled_PCHW[self.reference_R],
            torch.where(has_source, scale(vae, sources), 0.0),
        )


def _move(value, how):
    if isinstance(value, Tensor):
        return how(value)
    return Moments(how(value.mean), how(value.std)) if isinstance(value, Moments) else value


def collate(samples: Sequence[TrainingSample]) -> TrainingBatch:
    """Samples -> batch. An edit's source takes the posterior noise of its reference: one latent serves as both.

    Raises BadRecordsError for an instruction that mentions another number of images than its sample has: in the row of
    all images two such samples may cancel, and each would be trained on the other's.
    """
    for sample in samples:
        mentioned, given = sample.instruction.num_images, len(sample.posterior) - 1
        if mentioned != given:
            found = f"its instruction has {mentioned} {PLACEHOLDER} for {count(given, 'reference')}"
            raise BadRecordsError(f"{sample.where}: {found}; write one for each")
    target, reference, source, source_posterior, first = [], [], [], [], 0
    for sample in samples:
        target.append(first)
        reference += range(first + 1, first + len(sample.posterior))
        source.append(-1 if sample.source is None else first + 1 + sample.source)
        source_posterior.append(sample.posterior[1] if sample.task is Task.EDIT else sample.source_posterior)
        first += len(sample.posterior)
    with_moments = samples[0].moments is not None
    moments = [sample.moments for sample in samples if with_moments]
    return TrainingBatch(
        ids=tuple(sample.id for sample in samples),
        instructions=tuple(sample.instruction for sample in samples),
        vision_RCHW=_cat([sample.vision for sample in samples]),
        pixels_PCHW=_cat([sample.pixels for sample in samples]),
        moments=Moments(torch.cat([m.mean for m in moments]), torch.cat([m.std for m in moments])) if moments else None,
        noise_BCHW=torch.stack([sample.noise for sample in samples], dim=1).flatten(0, 1),
        posterior_PCHW=torch.cat([sample.posterior for sample in samples]),
        source_posterior_BCHW=torch.stack(source_posterior),
        task_B=torch.tensor([list(Task).index(sample.task) for sample in samples]),
        target_B=torch.tensor(target),
        reference_R=torch.tensor(reference, dtype=torch.long),
        source_B=torch.tensor(source),
        time_B=torch.tensor([sample.times for sample in samples]).T.flatten(),
        drop_text_B=torch.tensor([sample.drop_text for sample in samples]),
        drop_source_B=torch.tensor([sample.drop_source for sample in samples]),
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    return None if parts[0] is None else torch.cat(parts)

"""What the pipeline works on: a prompt with its images, and the randomness of its image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from mige.models.instruction import Instruction
from mige.tasks import Task


@dataclass(frozen=True)
class Sample:
    """One prompt with its images. The source, if any, is one of the references (the same object)."""

    task: Task
    prompt: str
    references: tuple[Image.Image, ...]
    source: Image.Image | None = None
    edit_type: str | None = None  # Emu Edit's kind of edit: chooses "of" or "in" where the prompt has no marker
    instruction: Instruction | None = None  # of the prompt, where it has been tokenised before
    whole: bool = (
        False  # the whole source is fitted to the output; else its centre is cut out, as the official code does
    )
    mask: Image.Image | None = None  # of the source's size, mode "L": 255 where it may change, else 0


@dataclass(frozen=True)
class SampleNoise:
    """All randomness of one sample; tensors are standard normal, float32 on the CPU."""

    latent: Tensor  # [4, h, w]
    references: tuple[Tensor, ...]  # one [4, h', w'] a reference: the VAE posterior's
    source: Tensor  # [4, h, w]: the posterior's of a source that is encoded apart from its reference
    step_seed: int  # of what a stochastic scheduler draws at its steps


def draw_sample_noise(
    shape: tuple[int, int, int], reference_shapes: Sequence[tuple[int, int, int]], generator: torch.Generator
) -> SampleNoise:
    """A sample's random numbers from its generator, in a fixed order, on the CPU.

    shape: [4, h, w] of its latent; reference_shapes: those of its references' latents.
    generator: the sample's own, on the CPU where images shall be alike on every device.
    """

    def randn(shape: tuple[int, int, int]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).cpu()

    return SampleNoise(
        randn(shape),
        tuple(randn(one) for one in reference_shapes),
        randn(shape),
        int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device)),
    )


def make_sample(
    prompt: str, references: Sequence[Image.Image], source: Image.Image | None, edit_type: str | None = None
) -> Sample:
    """A sample whose task follows from its images; raises ValueError if the source is not among the references."""
    if source is None:
        return Sample(Task.SUBJECT, prompt, tuple(references))
    references = tuple(references) or (source,)
    if not any(reference is source for reference in references):
        raise ValueError("the source must be among the references: <imagehere> stands for it too")
    task = Task.EDIT if len(references) == 1 else Task.SUBJECT_EDIT
    return Sample(task, prompt, references, source, edit_type)

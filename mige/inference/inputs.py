"""The first of inference's four steps: samples and their noise -> what the encoders read.

Letters: B samples of one task, R references of all samples, S places for images in all instructions (R, but where an
edit mentions its image again).
"""

import reprlib
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mige.data.checks import check_instruction
from mige.data.records import Record
from mige.inference.samples import Sample, SampleNoise
from mige.models.instruction import MAX_WORDS, Instruction, read_prompt
from mige.tasks import PLACEHOLDER, TASKS, Task, can_pair
from mige.utils import images


@dataclass(frozen=True)
class Inputs:
    """What the encoders read of B samples of one task; images are uint8 on the CPU, a quarter of what they become."""

    task: Task
    instructions: list[Instruction]  # B of them
    vision_RHWC: Tensor  # [R, 224, 224, 3], all references, squeezed for the vision tower
    references_RHWC: Tensor | None  # [R, H', W', 3], fitted for the VAE; None without references
    sources_BHWC: Tensor | None  # [B, H, W, 3]; None where the source is the reference, or there is none
    noise: Sequence[SampleNoise]

    @property
    def reference_noise(self) -> list[Tensor]:
        """The posterior's noise of each reference that is encoded, R times [4, h', w']."""
        return [draw for sample_noise in self.noise for draw in sample_noise.references]

    def spread(self, references_R: Tensor) -> Tensor:
        """What belongs to the references, [R, ...] -> [S, ...]: zeros in the places of images mentioned again.

        Only an edit has such: a prompt that mentions the image again, as the official rewriting makes of two of Emu
        Edit's, reads an all-zero image there.
        """
        slots, first = [], 0
        for instruction, sample_noise in zip(self.instructions, self.noise, strict=True):
            given = len(sample_noise.references)
            slots += [first + slot if slot < given else None for slot in range(instruction.num_images)]
            first += given
        if not slots:
            return references_R
        zero = torch.zeros_like(references_R[0])
        return torch.stack([zero if slot is None else references_R[slot] for slot in slots])


def prepare(
    samples: Sequence[Sample],
    noise: Sequence[SampleNoise],
    tokenizer: PreTrainedTokenizerBase,
    vision_size: int,
    cell: int,
    *,
    read: bool = True,
) -> Inputs:
    """Tokenise the prompts of B samples and fit their images.

    Args:
        noise: of each sample; its shapes decide the sizes that images are fitted to.
        vision_size: side of what the vision tower reads, px.
        cell: px of a latent cell along one side.
        read: False where the context of the prompts is known: then only the images to edit are fitted.

    Raises ValueError where the samples are of several tasks, and where markers and references do not pair.
    """
    task = samples[0].task
    if any(sample.task is not task for sample in samples):
        raise ValueError("the samples of one batch must be of one task: guidance and sizes depend on it")
    instructions = [instruct(sample, tokenizer) for sample in samples] if read else []
    references = [image for sample in samples for image in sample.references if read or task is Task.EDIT]
    vision = _each(lambda image: images.vision_levels(image, vision_size), references) if read else []
    by_task = images.letterbox if TASKS[task].letterbox else images.center_crop
    fit = [images.squeeze if s.whole and image is s.source and task is Task.EDIT else by_task
           for s in samples for image in s.references]  # fmt: skip
    draws = [draw for sample_noise in noise for draw in sample_noise.references if references]
    sources = None
    if task is Task.SUBJECT_EDIT:
        whole = [images.squeeze if sample.whole else images.center_crop for sample in samples]
        sources = _fit([sample.source for sample in samples], whole, noise[0].source, cell)
    return Inputs(
        task=task,
        instructions=instructions,
        vision_RHWC=_stack(vision) if vision else torch.zeros(0, vision_size, vision_size, 3, dtype=torch.uint8),
        references_RHWC=_fit(references, fit, draws[0], cell) if draws else None,
        sources_BHWC=sources,
        noise=noise,
    )


def read_prompts(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, num_queries: int, max_tokens: int
) -> list[Sample]:
    """The samples of a call with their prompts tokenised; a UserWarning tells what of a prompt is not read as written.

    num_queries: positions of an image in the context. max_tokens: the most of a context.
    Raises ValueError if markers don't pair with references, or an image would be cut off.
    """
    read: dict[int, Sample] = {}  # the images of a prompt share one sample
    for sample in samples:
        if id(sample) in read:
            continue
        instruction = instruct(sample, tokenizer)
        places = tuple(Path(str(number)) for number in range(len(sample.references)))
        where = f"prompt {reprlib.repr(sample.prompt)}"
        record = Record("call", sample.task, sample.prompt, places, None, None, sample.edit_type, where)
        for issue in check_instruction(record, instruction, tokenizer, num_queries, max_tokens):
            if issue.fatal:
                raise ValueError(str(issue))
            warnings.warn(f"{issue.where}: {issue.message}; {issue.hint}", stacklevel=4)  # where the pipeline is called
        read[id(sample)] = replace(sample, instruction=instruction)
    return [read[id(sample)] for sample in samples]


def instruct(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Instruction:
    """Token ids of a sample's prompt, read now or before.

    Raises ValueError if its markers don't pair with its references.
    """
    instruction = sample.instruction or read_prompt(sample.task, sample.prompt, sample.edit_type, tokenizer)
    read, given = instruction.num_images, len(sample.references)
    if not can_pair(sample.task, sample.prompt, read, given):
        raise ValueError(
            f"prompt {sample.prompt!r}: {read} {PLACEHOLDER}, {given} references; "
            f"write one for each reference (at most {MAX_WORDS} words are read)"
        )
    return instruction


def _fit(
    originals: Sequence[Image.Image],
    fits: Sequence[Callable[[Image.Image, int, int], Image.Image]],
    draw: Tensor,
    cell: int,
) -> Tensor:
    """Images, each fitted in its way to the size of a draw [4, h, w] of their posterior -> uint8 [B, H, W, 3]."""
    height, width = (side * cell for side in draw.shape[1:])
    return _stack(_each(lambda image, fit: images.to_levels(fit(image, height, width)), originals, fits))


def _stack(levels: Sequence[Tensor]) -> Tensor:
    """B of uint8 [H, W, 3] -> [B, H, W, 3]; not by OpenMP's threads, which wait for each other on a busy host."""
    return torch.from_numpy(np.stack([one.numpy() for one in levels]))


def _each(function: Callable[..., Tensor], originals: Sequence[Image.Image], *others: Sequence) -> list[Tensor]:
    """The function of every image, in threads: resizing leaves the interpreter free, and the GPU waits for it."""
    with ThreadPoolExecutor(min(8, max(1, len(originals)))) as pool:
        return list(pool.map(function, originals, *others))

"""Classifier-free guidance as data: which branches a task needs and what each one weighs.

The guided noise estimate is a weighted sum over the branches "none" (text and source dropped), "source" (text dropped)
and "full". Rearranged so that each branch occurs once, and the weights add up to 1:

* editing: `none + s_src (source - none) + s_txt (full - source)` (InstructPix2Pix, arXiv 2211.09800, eq. 3);
* subject-driven: `none + s (full - none)` (Ho & Salimans, arXiv 2207.12598, eq. 6); there is no source to drop.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from mige.diffusion.conditioning import Condition, Context
from mige.tasks import Task


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network: what is dropped from the condition, and its weight in the sum."""

    weight: float
    drop_text: bool
    drop_source: bool


@dataclass(frozen=True)
class Guidance:
    """How far the caller wants a batch of samples of one task guided; None: as `settings.resolve` says."""

    task: Task
    text: float | None = None  # towards the whole instruction; 1: none
    source: float | None = None  # towards the source image; 1: none; without meaning for the subject task


def branches(task: Task, guidance: float, source_guidance: float) -> list[Branch]:
    """The branches to evaluate; one that weighs exactly nothing is left out (same result, less work).

    With the default source guidance of 1, editing needs two of its three branches; with both scales 1, only "full".
    """
    if task is Task.SUBJECT:
        none, source, full = 1 - guidance, 0.0, guidance
    else:
        none, source, full = 1 - source_guidance, source_guidance - guidance, guidance
    table = [Branch(none, True, True), Branch(source, True, False), Branch(full, False, False)]
    return [branch for branch in table if branch.weight != 0]


def stack(condition: Condition, chosen: list[Branch], null_LC: Tensor, negative: Context | None = None) -> Condition:
    """The condition of every branch, one batch after the other.

    Args:
        condition: of B samples: context float [B, L, C], mask int [B, L] or None, source float [B, 4, h, w].
        chosen: from `branches`, at least one.
        null_LC: the learnt context of a dropped text, float [max tokens, C], in the context's dtype, on its device.
        negative: of a negative prompt, B rows as long as the condition's: read in place of the null context.

    Returns a condition of len(chosen) * B samples, branch by branch, as `combine` takes their estimates apart.
    """
    parts = []
    for branch in chosen:
        if branch.drop_text and negative is not None:
            read = replace(condition, context_BLC=negative.context_BLC, mask_BL=negative.mask_BL)
            parts.append(read.drop(null_LC, source=branch.drop_source))
        else:
            parts.append(condition.drop(null_LC, text=branch.drop_text, source=branch.drop_source))
    return Condition.stack(parts)


def combine(eps_BCHW: Tensor, chosen: list[Branch]) -> Tensor:
    """Weighted sum of the branches' noise estimates, in float32: [len(chosen) * B, C, h, w] -> [B, C, h, w]."""
    parts = eps_BCHW.float().chunk(len(chosen))
    return sum(branch.weight * part for branch, part in zip(chosen, parts, strict=True))

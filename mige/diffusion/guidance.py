"""Classifier-free guidance as data: which branches a task needs and what each one weighs.

The guided noise estimate is a weighted sum over the branches "none" (text and source dropped), "source" (text dropped)
and "full". Rearranged so that each branch stands once, and the weights add up to 1:

* editing: `none + s_src (source - none) + s_txt (full - source)` (InstructPix2Pix, arXiv 2211.09800, eq. 3);
* subject-driven: `none + s (full - none)` (Ho & Salimans, arXiv 2207.12598, eq. 6); there is no source to drop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from mige.diffusion.conditioning import Condition
from mige.tasks import Task


@dataclass(frozen=True)
class Branch:
    """One evaluation of the network: what is dropped from the condition, and its weight in the sum."""

    weight: float
    drop_text: bool
    drop_source: bool


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


def stack(condition: Condition, chosen: list[Branch], null_LC: Tensor) -> Condition:
    """The condition of every branch, one batch after the other: batch size B -> len(chosen) * B."""
    return Condition.stack([condition.drop(null_LC, text=b.drop_text, source=b.drop_source) for b in chosen])


def combine(eps_BCHW: Tensor, chosen: list[Branch]) -> Tensor:
    """Weighted sum of the branches' noise estimates, in float32: [len(chosen) * B, C, h, w] -> [B, C, h, w]."""
    parts = eps_BCHW.float().chunk(len(chosen))
    return sum(branch.weight * part for branch, part in zip(chosen, parts, strict=True))


Denoise = Callable[[Tensor, Tensor], Tensor]


def within(
    interval: tuple[float, float],
    times: Sequence[float],
    guided: Callable[[], Denoise],
    alone: Callable[[], Denoise],
) -> Denoise:
    """Guidance only while the model time is in the interval; outside, the full branch alone (arXiv 2404.07724).

    An approximation of the guided sampler: fewer branches are computed.

    Args:
        times: of all calls, in their order.
        guided, alone: make the noise estimate of either kind, anew whenever the interval is entered or left.
    """
    low, high = interval
    turns = iter([low <= time <= high for time in times])
    is_guided, estimate = None, None

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        nonlocal is_guided, estimate
        before, is_guided = is_guided, next(turns)
        if is_guided is not before:
            estimate = guided() if is_guided else alone()
        return estimate(x_BCHW, t)

    return denoise

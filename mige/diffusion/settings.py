"""How a checkpoint is sampled: as the caller says, else as its scheduler's config says, else as is official."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mige.diffusion.guidance import Branch, branches
from mige.tasks import TASKS, Task


@dataclass(frozen=True)
class Usual:
    """Settings where neither the caller nor the checkpoint has any."""

    steps: int
    guidance: float
    source_guidance: float


WORLD = Usual(steps=20, guidance=2.0, source_guidance=1.0)
"""For models of the miniature world: what the mini-bench scores them with (docs/mini.md)."""


@dataclass(frozen=True)
class Sampling:
    """The settings in force for one task."""

    steps: int
    guidance: float
    source_guidance: float
    branches: list[Branch]


def resolve(
    scheduler: Mapping[str, Any],
    task: Task,
    steps: int | None = None,
    guidance: float | None = None,
    source_guidance: float | None = None,
    usual: Usual | None = None,
) -> Sampling:
    """The settings of a call.

    Args:
        scheduler: the config of the checkpoint's scheduler. That of a few-step student has `num_inference_steps`, and
            `guidance_inside` where guidance is in its weights; it keeps both where its scheduler is exchanged.
        steps, guidance, source_guidance: None where the caller names none.
        usual: in place of the official settings of the task.

    Raises ValueError for a guidance beside one that is in the weights.
    """
    usual = usual or TASKS[task]
    inside = bool(scheduler.get("guidance_inside", False))
    if inside:
        for name, value in (("guidance_scale", guidance), ("source_guidance_scale", source_guidance)):
            if value is not None and value != 1:
                raise ValueError(
                    f"{name} is {value:g}, but guidance is in the weights of this checkpoint, a few-step student, and "
                    "one branch is evaluated: leave the guidance out (or give 1), or load its teacher"
                )
    if steps is None:
        steps = scheduler.get("num_inference_steps") or usual.steps
    if guidance is None:
        guidance = 1.0 if inside else usual.guidance
    if source_guidance is None:
        source_guidance = 1.0 if inside else usual.source_guidance
    return Sampling(steps, guidance, source_guidance, branches(task, guidance, source_guidance))

"""The noise estimate of inference's third step: the plain forward pass, and what a callback may change."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mige.diffusion.conditioning import Condition, Context
from mige.diffusion.guidance import Branch, combine
from mige.diffusion.settings import Sampling
from mige.diffusion.solver import Denoise
from mige.models.mige import MIGEModel

TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "image_latents")
"""What a callback may read and replace: x, the contexts with and without the text, and the scaled source latents."""

OnStepEnd = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""diffusers' `callback_on_step_end`: (pipeline, step, time, tensors) -> those to replace, by their names."""


def guided_estimate(model: MIGEModel, condition: Condition, branches: list[Branch]) -> Denoise:
    """The guided noise estimate, float32 [B, 4, h, w]; `condition`: of all branches stacked."""

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        repeated = x_BCHW.repeat(len(branches), 1, 1, 1)
        output = model.denoise(repeated, t.expand(len(repeated)), condition)  # [branches * B, 8, h, w]
        return combine(output[:, : x_BCHW.shape[1]], branches)

    return denoise


class Interrupted(Exception):  # noqa: N818 - not an error: somebody asked for it
    """`pipe._interrupt` was set in a callback; `latents`, float [B, 4, h, w], are those of the last finished step."""

    def __init__(self, latents: Tensor):
        super().__init__("interrupted")
        self.latents = latents


class Denoising:
    """A run's guided noise estimate, as the solver calls it; made anew where a callback changes what it is made of.

    Args:
        build: (condition of B samples, negative context or None, branches) -> the estimate.
        condition: of B samples. negative: of their negative prompts, if any, as long.
        how: the settings in force.
    """

    def __init__(
        self,
        build: Callable[[Condition, Context | None, list[Branch]], Denoise],
        condition: Condition,
        negative: Context | None,
        how: Sampling,
    ):
        self.condition, self.negative, self.how = condition, negative, how
        self.time: Tensor | None = None  # that the last estimate was asked for at
        self._build, self._estimate = build, None
        self._versions: dict[str, int] = {}  # of the tensors that a callback was given

    def __call__(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        """The noise estimate of x, float32 [B, 4, h, w], at a model time."""
        if self._estimate is None:
            self._estimate = self._build(self.condition, self.negative, self.how.branches)
        self.time = t
        return self._estimate(x_BCHW, t)

    def rescale(self, how: Sampling) -> None:
        """Continue with other scales."""
        if how != self.how:
            self.how, self._estimate = how, None

    def tensors(self, names: Iterable[str], x_BCHW: Tensor, null_LC: Tensor) -> dict[str, Tensor]:
        """What a callback is given: tensors by the names of `TENSORS`, the contexts [B, L, C], the others [B, 4, h, w].

        null_LC: the learnt context of a dropped text, which is the negative one where there is no negative prompt.
        """
        context = self.condition.context_BLC
        null = null_LC[: context.shape[1]].to(context).expand_as(context)
        every = {
            "latents": x_BCHW,
            "prompt_embeds": context,
            "negative_prompt_embeds": null.clone() if self.negative is None else self.negative.context_BLC,
            "image_latents": self.condition.source_BCHW,
        }
        given = {name: every[name] for name in names}
        self._versions = {name: tensor._version for name, tensor in given.items()}
        return given

    def take(self, given: Mapping[str, Tensor], returned: Mapping[str, Tensor]) -> Tensor | None:
        """Put what a callback returned, of the same shapes, in the place of what it was given; its latents, if changed.

        Raises ValueError for a tensor that it was not given, or of another shape.
        """
        changed = {}
        for name, value in returned.items():
            if name not in given:
                raise ValueError(f"the callback returned {name!r}, but was given {', '.join(given) or 'nothing'}")
            if not isinstance(value, Tensor) or value.shape != given[name].shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"the callback returned {name} of {got}, expected the shape {list(given[name].shape)}")
            if value is not given[name] or value._version != self._versions[name]:  # replaced, or written into
                changed[name] = value
        if "prompt_embeds" in changed:
            self.condition = replace(self.condition, context_BLC=changed["prompt_embeds"])
        if "image_latents" in changed:
            self.condition = replace(self.condition, source_BCHW=changed["image_latents"])
        if "negative_prompt_embeds" in changed:
            mask_BL = self.condition.mask_BL if self.negative is None else self.negative.mask_BL
            self.negative = Context(changed["negative_prompt_embeds"], mask_BL)
        if changed.keys() - {"latents"}:
            self._estimate = None
        return changed.get("latents")

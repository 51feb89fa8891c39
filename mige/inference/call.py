"""A call of the pipeline, read from its arguments and checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from mige.diffusion.conditioning import Context
from mige.diffusion.settings import resolve
from mige.inference import arguments
from mige.inference.denoising import TENSORS, OnStepEnd
from mige.inference.samples import Sample, SampleNoise
from mige.inference.shapes import Shape, wish_of
from mige.inference.sizes import SizeGrid
from mige.tasks import placeholders


@dataclass(frozen=True)
class Call:
    """What `MIGEPipeline.run` needs of a call: B prompts, N images of each, B N samples."""

    samples: list[Sample]
    generators: list[torch.Generator]  # of each sample
    shape: Shape  # of every output
    latents: Tensor | None  # [B N, 4, h, w]
    settings: dict[str, Any]  # keyword arguments of `run`

    def with_latents(self, noise: Sequence[SampleNoise]) -> list[SampleNoise]:
        """The noise with the call's latents in it, where it has any."""
        if self.latents is None:
            return list(noise)
        return [replace(one, latent=own.float().cpu()) for one, own in zip(noise, self.latents, strict=True)]


def read_call(given: dict[str, Any], grid: SizeGrid, scheduler: Any, compiled: bool, text: tuple[int, int]) -> Call:
    """Check the arguments of `MIGEPipeline.__call__` and make them plain.

    Args:
        given: all of them, by name.
        grid: the model's sizes. scheduler: the pipeline's. compiled: whether it is in that mode.
        text: most positions of a context, and their channels.

    Raises ValueError, TypeError or BadImageError for one that is not what it should be.
    """
    steps, guidance, source_guidance = arguments.numbers_of(
        given["num_inference_steps"],
        given["guidance_scale"],
        _either(given, "source_guidance_scale", "image_guidance_scale"),
    )
    reuse = arguments.number("reuse", given["reuse"], whole=True, least=1)
    each = arguments.number("num_images_per_prompt", given["num_images_per_prompt"], whole=True, least=1)
    arguments.check_run(scheduler, given["output_type"], given["on_step"], reuse, compiled)
    on_step_end, tensors = _callback(given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"])
    context = _context(given, "prompt", text)
    count = None if context is None else len(context.context_BLC)
    samples = arguments.samples_of(given["prompt"], given["references"], _either(given, "source", "image"), count)
    generators = arguments.generators_of(given["seed"], given["generator"], len(samples), each)
    how = resolve(scheduler.config, samples[0].task, steps, guidance, source_guidance)  # refuses, if it must
    negative = _negative(given, len(samples), text, any(branch.drop_text for branch in how.branches), each)
    latents = given["latents"]
    if any(sample.task is not samples[0].task for sample in samples):
        raise ValueError("the prompts of one call must be of one task: guidance and sizes depend on it")
    shape = _shape_of(given, samples, grid)
    _check_latents(latents, (len(samples) * each, *grid.latent_shape(*shape.size)))
    masks = arguments.masks_of(given["mask"], samples)
    samples = [replace(one, whole=shape.whole, mask=mask) for one, mask in zip(samples, masks, strict=True)]
    return Call(
        samples=[sample for sample in samples for _ in range(each)],
        generators=generators,
        shape=shape,
        latents=latents,
        settings=dict(
            steps=steps,
            text_guidance=guidance,
            source_guidance=source_guidance,
            on_step=given["on_step"],
            reuse=reuse,
            output_type=given["output_type"],
            paste_back=_paste_back(given, samples[0]),
            context=context and _repeat(context, each),
            negative=negative,
            on_step_end=on_step_end,
            tensor_inputs=tensors,
        ),
    )


def _either(given: dict[str, Any], name: str, other: str) -> Any:
    """An argument that has two names; raises ValueError where both are given."""
    if given[name] is not None and given[other] is not None:
        raise ValueError(f"{name} and {other} are two names of one argument: give one of them")
    return given[other] if given[name] is None else given[name]


def _callback(on_step_end: Any, names: Any) -> tuple[OnStepEnd | None, Sequence[str]]:
    """The callback, and the tensors that it is given; raises ValueError for others than `TENSORS`."""
    if on_step_end is not None and not callable(on_step_end):
        raise ValueError(f"callback_on_step_end is {on_step_end!r}, expected a function of (pipe, step, time, tensors)")
    if isinstance(on_step_end, PipelineCallback | MultiPipelineCallbacks):
        names = on_step_end.tensor_inputs
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ValueError(f"callback_on_step_end_tensor_inputs is {names!r}, expected a list of names")
    if unknown := [name for name in names if name not in TENSORS]:
        known = ", ".join(TENSORS)
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}, expected names of {known}")
    return on_step_end, names


def _context(given: dict[str, Any], name: str, text: tuple[int, int]) -> Context | None:
    """What `encode_prompt` returned, given back, in place of a prompt or a negative one."""
    embeds, key = given[f"{name}_embeds"], f"{name}_attention_mask"
    mask = given[key]
    if embeds is None:
        if mask is not None:
            raise ValueError(f"{key} is given without {name}_embeds: give both")
        if name == "prompt" and given["prompt"] is None:
            raise ValueError("prompt is None: give a text, a list of them, or prompt_embeds")
        return None
    if given[name] is not None:
        raise ValueError(f"both {name} and {name}_embeds are given: give one of them")
    most, channels = text
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or embeds.shape[2] != channels or embeds.shape[1] > most:
        raise ValueError(f"{name}_embeds is {_shape(embeds)}, expected a tensor [prompts, up to {most}, {channels}]")
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if not isinstance(mask, Tensor) or mask.shape != embeds.shape[:2]:
        raise ValueError(f"{key} is {_shape(mask)}, expected a tensor {list(embeds.shape[:2])}")
    return Context(embeds, mask.long())


def _negative(
    given: dict[str, Any], prompts: int, text: tuple[int, int], is_read: bool, each: int
) -> list[str] | Context | None:
    """The negative prompts of all samples, or their context."""
    context, negative = _context(given, "negative_prompt", text), given["negative_prompt"]
    if context is None and negative is None:
        return None
    if not is_read:
        raise ValueError("negative_prompt is given, but at this guidance no branch without the prompt is evaluated: "
                         "leave it out, or give a guidance_scale other than 1")  # fmt: skip
    if context is not None:
        if len(context.mask_BL) not in (1, prompts):
            raise ValueError(f"negative_prompt_embeds has {len(context.mask_BL)} rows for {prompts} prompts")
        return _repeat(context, each * prompts // len(context.mask_BL))
    texts = [negative] * prompts if isinstance(negative, str) else negative
    if not isinstance(texts, Sequence) or any(not isinstance(one, str) for one in texts) or len(texts) != prompts:
        raise ValueError(f"negative_prompt is {negative!r}, expected a text, or a list of {prompts} of them")
    for one in texts:
        arguments.check_text("negative_prompt", one)
    if marked := next((one for one in texts if placeholders(one)), None):
        raise ValueError(f"negative_prompt is {marked!r}, but a negative prompt has no images: write words alone")
    return [one for one in texts for _ in range(each)]


def _repeat(context: Context, times: int) -> Context:
    return Context(context.context_BLC.repeat_interleave(times, 0), context.mask_BL.repeat_interleave(times, 0))


def _shape_of(given: dict[str, Any], samples: Sequence[Sample], grid: SizeGrid) -> Shape:
    """The shape of all outputs: as asked for, else that of the latents, else the source's, else the native one."""
    height, width = arguments.sides_of(given["height"], given["width"])
    long_side = arguments.optional("long_side", given["long_side"], whole=True, least=1)
    latents, follows = given["latents"], wish_of(given["size"], height, width, long_side)
    shapes = [follows.of_task(grid, one.task, one.source and one.source.size) for one in samples]
    if isinstance(latents, Tensor) and latents.ndim == 4 and given["size"] is None and long_side is None:
        own = tuple(side * grid.cell for side in latents.shape[2:])
        if shapes[0].size != own:
            return Shape(*grid.resolve(own[0] if height is None else height, own[1] if width is None else width))
    if other := next((one for one in shapes if one != shapes[0]), None):
        both = " and ".join(f"{one.width} x {one.height} px" for one in (shapes[0], other))
        raise ValueError(f"the sources ask for outputs of {both}: give a size such as 'native', or a call each")
    return shapes[0]


def _paste_back(given: dict[str, Any], sample: Sample) -> bool:
    if given["paste_back"] and (sample.source is None or given["output_type"] != "pil"):
        raise ValueError("paste_back is True, which needs a source and output_type 'pil': leave it out")
    return bool(given["paste_back"])


def _check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    if latents is not None and not (isinstance(latents, Tensor) and latents.shape == shape):
        raise ValueError(f"latents is {_shape(latents)}, expected standard normal noise [{', '.join(map(str, shape))}]")


def _shape(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

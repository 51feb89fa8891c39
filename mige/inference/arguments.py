"""The arguments of a call, checked and made plain before anything runs: numbers, seeds, prompts and their images."""

import math
import reprlib
from collections.abc import Sequence
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige.data.records import UNSTORABLE
from mige.diffusion.solver import why_not
from mige.inference.samples import Sample, make_sample
from mige.utils.images import as_image, image_key
from mige.utils.masks import as_mask

SEEDS = 2**63
"""Seeds are whole numbers from 0 to below this."""


def number(name: str, value: Any, *, whole: bool = False, least: float | None = None) -> int | float:
    """A finite number as a plain int or float; NumPy scalars, 0-dim arrays and tensors, and 5.0 for 5 are taken too.

    Raises ValueError naming the argument, what was got and what was expected.
    """
    scalar = isinstance(value, np.generic | np.ndarray | Tensor) and math.prod(value.shape) == 1
    plain = value.item() if scalar else value
    kind = "a whole number" if whole else "a number"
    expected = kind if least is None else f"{kind} of at least {least:g}"
    if isinstance(plain, bool) or not isinstance(plain, Number) or isinstance(plain, complex):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    if not _is_finite(plain) or (whole and plain != int(plain)) or (least is not None and plain < least):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected {expected}")
    return int(plain) if whole else float(plain)


def _is_finite(plain: Number) -> bool:
    try:
        return math.isfinite(plain)
    except OverflowError:  # a whole number beyond all floats
        return False


def optional(name: str, value: Any, **how: Any) -> int | float | None:
    """The same, or None."""
    return None if value is None else number(name, value, **how)


def check_text(name: str, text: str) -> None:
    """Raise ValueError for half a surrogate pair or a NUL in a text, which no tokenizer takes."""
    if character := UNSTORABLE.search(text):
        raise ValueError(f"{name} holds {character.group()!r}, which is no character of a text; remove it")


def numbers_of(steps: Any, guidance: Any, source_guidance: Any) -> tuple[int | None, float | None, float | None]:
    """Steps, text guidance and source guidance of a call as plain numbers or None; errors as `number`."""
    return (
        optional("num_inference_steps", steps, whole=True, least=1),
        optional("guidance_scale", guidance, least=0),
        optional("source_guidance_scale", source_guidance, least=0),
    )


def sides_of(height: Any, width: Any) -> tuple[int | None, int | None]:
    """Height and width of a call, px, as plain numbers or None; errors as `number`."""
    return optional("height", height, whole=True), optional("width", width, whole=True)


def check_run(scheduler: Any, output_type: Any, on_step: Any, reuse: int, compiled: bool) -> None:
    """Raise ValueError for how a call cannot run.

    That is another output type, a scheduler that cannot sample, an `on_step` that cannot be called, `reuse` uncompiled.
    """
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
    if reason := why_not(scheduler):
        raise ValueError(reason)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r}, expected a function of (step, latent, estimate), or None")
    if reuse > 1 and not compiled:
        raise ValueError(f"reuse must be 1, or more with compile=True, got {reuse}")


def generators_of(seed: Any, generator: Any, prompts: int, each: int) -> list[torch.Generator]:
    """The generator of every image, `each` of them a prompt.

    Args:
        seed: one for all prompts, one a prompt, or one an image; the further images of a prompt take the seeds after
            its own. None: 0, where there is no generator either.
        generator: one, from which the images draw in turn, or a list of one an image.

    Raises ValueError for both, a wrong number of them or a bad one.
    """
    images = prompts * each
    if generator is None:
        return [torch.Generator().manual_seed(one) for one in _seeds_of(0 if seed is None else seed, prompts, each)]
    if seed is not None:
        raise ValueError("both seed and generator are given: give one of them")
    given = list(generator) if isinstance(generator, list | tuple) else [generator] * images
    if len(given) != images:
        raise ValueError(f"{images} images, {len(given)} generators; give one for all, or one each")
    if wrong := [one for one in given if not isinstance(one, torch.Generator)]:
        raise ValueError(f"generator is {wrong[0]!r}, expected a torch.Generator, or a list of them")
    return given


def _seeds_of(seed: Any, prompts: int, each: int) -> list[int]:
    several = isinstance(seed, Sequence) and not isinstance(seed, str)
    several = several or (isinstance(seed, np.ndarray | Tensor) and seed.ndim == 1)
    seeds = list(seed) if several else [seed] * prompts
    if len(seeds) not in (prompts, prompts * each):
        raise ValueError(f"{prompts} prompts, {len(seeds)} seeds; give one for all, or one each")
    plain = [number("seed", one, whole=True, least=0) for one in seeds]
    if len(plain) == prompts:
        plain = [one + image for one in plain for image in range(each)]
    if large := next((one for one in plain if one >= SEEDS), None):
        raise ValueError(f"seed is {large}, expected a whole number below 2**63")
    return plain


def samples_of(prompt: Any, references: Any, source: Any, count: int | None = None) -> list[Sample]:
    """The samples of a call.

    Args:
        prompt: a text, or a list of them; None where their context is known already, of `count` of them.
        references: of one prompt an image or a list of images; of several a list with that for each; None for none.
        source: an image for all prompts, or a list; None for none. An image that equals a reference is that reference.
        An image is whatever `as_image` takes: a path, a PIL image, an array, a tensor.

    Raises ValueError where numbers do not agree, a prompt is no text or empty, or a source is not among its
    references; TypeError for what is no image; BadImageError for one that cannot be used.
    """
    if count is not None:
        prompts, is_one = [""] * count, count == 1
    else:
        prompts, is_one = [prompt] if isinstance(prompt, str) else _listed("prompt", prompt), isinstance(prompt, str)
        for one in prompts:
            if not isinstance(one, str) or not one.strip():
                raise ValueError(f"prompt is {one!r}, expected a text")
            check_text("prompt", one)
        if not prompts:
            raise ValueError("prompt is an empty list, expected at least one text")
    lists = [references] if is_one else _each("references", references, len(prompts))
    sources = _each("source", source, len(prompts))
    return [_sample(*given) for given in zip(prompts, lists, sources, strict=True)]


def masks_of(mask: Any, samples: Sequence[Sample]) -> list[Image.Image | None]:
    """The mask of each sample, mode "L" and of its source's size, from one for all, or a list.

    Raises ValueError where a sample has no source, or numbers don't agree; BadImageError as `as_mask`.
    """
    if mask is None:
        return [None] * len(samples)
    if samples[0].source is None:
        raise ValueError("mask is given without a source: it says what of a source may change")
    masks = [mask] * len(samples) if _is_image(mask) else _listed("mask", mask)
    if len(masks) != len(samples):
        raise ValueError(f"{len(samples)} prompts, but mask has {len(masks)} entries; give one for all, or one each")
    return [as_mask(one, sample.source.size) for one, sample in zip(masks, samples, strict=True)]


def _sample(prompt: str, references: Any, source: Any) -> Sample:
    given = [] if references is None else [references] if _is_image(references) else _listed("references", references)
    images = [as_image(image) for image in given]
    if source is None:
        return make_sample(prompt, images, None)
    image = as_image(source)
    if images:  # the same image, though opened twice
        key = image_key(image)
        image = next((reference for reference in images if image_key(reference) == key), image)
    return make_sample(prompt, images, image)


def _each(name: str, value: Any, prompts: int) -> list:
    """A value for each prompt: one for all, or a list, tensor or array [B, ...] of as many."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 4:  # [B, 3, H, W] or [B, H, W, 3], as in diffusers
        value = list(value)
    if value is None or (_is_image(value) and name == "source"):
        return [value] * prompts
    values = [value] if _is_image(value) else _listed(name, value)
    if len(values) != prompts:
        raise ValueError(f"{prompts} prompts, but {name} has {len(values)} entries; give one each")
    return values


def _listed(name: str, value: Any) -> list:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ValueError(f"{name} is {type(value).__name__}, expected a list")
    return list(value)


def _is_image(value: Any) -> bool:
    return isinstance(value, str | Path | Image.Image | np.ndarray | Tensor)

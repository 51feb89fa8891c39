"""The second of inference's four steps: what the encoders read -> the condition of the DiT.

Letters: B samples, R references of all samples; latents are [B, 4, h, w], images a side of 8 h.
"""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mige.diffusion.conditioning import Condition, Context
from mige.inference.inputs import Inputs
from mige.models.instruction import negative_text, tokenize
from mige.models.mige import MIGEModel
from mige.models.vae import encode, scale
from mige.tasks import Task
from mige.utils import images


def encode_inputs(
    model: MIGEModel, vae: AutoencoderKL, inputs: Inputs, device: torch.device, context: Context | None = None
) -> Condition:
    """Everything the DiT needs of B samples besides noisy latents and time, on the device.

    context: [B, L, C], where it has been encoded before: then of the images only the sources are.
    Raises ValueError if the instructions have room for another number of images.
    """
    vision_RCHW = images.vision_pixels_of(inputs.vision_RHWC.to(device))  # first: a copy waits for the GPU's queue
    unscaled_RCHW = encode_references(vae, inputs, device)
    source_BCHW = encode_sources(vae, inputs, unscaled_RCHW)
    if context is not None:
        return Condition(context.context_BLC.to(device), context.mask_BL.to(device), source_BCHW)
    return model.encode(inputs.instructions, inputs.spread(vision_RCHW), inputs.spread(unscaled_RCHW), source_BCHW)


def encode_text(
    model: MIGEModel, tokenizer: PreTrainedTokenizerBase, task: Task, prompts: Sequence[str], device: torch.device
) -> Context:
    """The context of negative prompts, texts without images: float [B, L, C] and its mask, on the device."""
    instructions = [tokenize(negative_text(task, prompt), tokenizer) for prompt in prompts]
    side, grid = model.encoder.image_encoder.config.image_size, model.transformer.config
    no_latents = torch.zeros(0, grid.in_channels // 2, grid.sample_size, grid.sample_size, device=device)
    read = model.encode(instructions, torch.zeros(0, 3, side, side, device=device), no_latents, no_latents)
    return Context(read.context_BLC, read.mask_BL)


def encode_references(vae: AutoencoderKL, inputs: Inputs, device: torch.device) -> Tensor:
    """Unscaled latents of all references, [R, 4, h', w']: of the native size, or of the output's if it is edited."""
    if inputs.references_RHWC is None:
        return torch.zeros(0, *inputs.noise[0].latent.shape, device=device)
    return _posterior(vae, inputs.references_RHWC, inputs.reference_noise, device)


def encode_sources(vae: AutoencoderKL, inputs: Inputs, unscaled_RCHW: Tensor) -> Tensor:
    """Scaled latents of the images to edit, [B, 4, h, w]; zeros where an image is made from nothing.

    An edit reads one posterior sample as its reference (`unscaled_RCHW`) and as its source; a subject edit draws a
    second one.
    """
    if inputs.task is Task.SUBJECT:
        return torch.zeros(len(inputs.noise), *inputs.noise[0].latent.shape, device=unscaled_RCHW.device)
    if inputs.task is Task.EDIT:
        return scale(vae, unscaled_RCHW)
    draws = [sample_noise.source for sample_noise in inputs.noise]
    return scale(vae, _posterior(vae, inputs.sources_BHWC, draws, unscaled_RCHW.device))


def _posterior(vae: AutoencoderKL, levels_BHWC: Tensor, draws: Sequence[Tensor], device: torch.device) -> Tensor:
    """One sample of the VAE's posterior of each image, uint8 [B, H, W, 3], unscaled."""
    noise_BCHW = torch.stack(list(draws)).to(device)
    pixels_BCHW = images.pixels_of(levels_BHWC.to(device))
    return encode(vae, pixels_BCHW).sample(noise_BCHW)

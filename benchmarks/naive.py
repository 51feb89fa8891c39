"""What the released code computes in every solver step, with our parts: the yardstick of bench_inference.py."""

from collections.abc import Callable

from torch import Tensor

from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch
from mige.inference.encoding import encode_references, encode_sources
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise
from mige.tasks import TASKS, Task
from mige.utils import images

SLOTS = 4  # images the released code encodes for every sample


def naive_denoiser(pipeline: MIGEPipeline, chosen: list[Sample], noise: list[SampleNoise]) -> Callable:
    """The released sampling loop's `denoise`: encodes all slots and the padded text again, runs every branch."""
    task, model = chosen[0].task, pipeline.model
    model.encoder.pad_to = pipeline.fusion.config.max_tokens
    inputs = pipeline.prepare(chosen, noise)
    unscaled = encode_references(pipeline.vae, inputs, pipeline._execution_device)
    source = encode_sources(pipeline.vae, inputs, unscaled)
    counts = [len(sample.references) for sample in chosen]
    used = [SLOTS * n + slot for n, count in enumerate(counts) for slot in range(count)]
    vision = images.vision_pixels_of(inputs.vision_RHWC.to(unscaled.device))
    slots = [_slots(rows, used, len(chosen)) for rows in (vision, unscaled)]
    scale = TASKS[task].guidance
    branches = [Branch(1 - scale, True, False), Branch(scale, False, False)]
    if task is not Task.SUBJECT:
        branches = [Branch(0.0, True, True), *branches]

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        tokens_RQC = model.encoder.encode_images(slots[0], model.patchify(slots[1]))[used]
        embeds, mask = model.encoder.interleave(inputs.instructions, tokens_RQC)
        context = model.encoder.text_encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        stacked = guidance.stack(Condition(context, mask, source), branches, model.null_context.to(context))
        repeated = x_BCHW.repeat(len(branches), 1, 1, 1)
        output = model.denoise(repeated, t.expand(len(repeated)), stacked)
        return guidance.combine(output[:, : x_BCHW.shape[1]], branches)

    return denoise


def _slots(rows_R: Tensor, used: list[int], batch: int) -> Tensor:
    """[R, ...] -> [4 x batch, ...], zeros in the empty slots."""
    every = rows_R.new_zeros(SLOTS * batch, *rows_R.shape[1:])
    every[used] = rows_R
    return every

"""The pipeline's four steps, one after the other: prepare, encode, denoise, decode.

Letters: B prompts, R references of all prompts, L context positions; latents are [B, 4, h, w], images 8 h high.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mige.diffusion import settings, solver
from mige.diffusion.conditioning import Condition, Context
from mige.diffusion.guidance import Branch, Guidance, stack
from mige.inference.compositing import finish, hold, mask_of_latent
from mige.inference.denoising import TENSORS, Denoising, Interrupted, OnStepEnd, guided_estimate
from mige.inference.encoding import encode_inputs, encode_text
from mige.inference.inputs import Inputs, prepare
from mige.inference.samples import Sample, SampleNoise, draw_sample_noise
from mige.inference.sizes import SizeGrid
from mige.models.fast_dit import FastDenoiser
from mige.models.vae import decode
from mige.tasks import Task
from mige.utils import images


class Steps:
    """What the pipeline computes; its parts are attributes by their names."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(TENSORS)
    _guidance_scale: float | None = None
    _image_guidance_scale: float | None = None
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float | None:
        """Text guidance of the latest run; a callback may change `_guidance_scale` from one step to the next."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float | None:
        """Source guidance of the latest run; a callback may change `_image_guidance_scale`."""
        return self._image_guidance_scale

    @property
    def num_timesteps(self) -> int:
        """How often the latest run asks the DiT, all branches counted once."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run ends after this step: a callback sets `_interrupt`; the latents are returned as they are."""
        return self._interrupt

    @torch.no_grad()
    def run(
        self,
        samples: Sequence[Sample],
        noise: Sequence[SampleNoise],
        *,
        steps: int | None = None,
        text_guidance: float | None = None,
        source_guidance: float | None = None,
        on_step: solver.OnStep | None = None,
        reuse: int = 1,
        output_type: str = "latent",
        paste_back: bool = False,
        context: Context | None = None,
        negative: Sequence[str] | Context | None = None,
        on_step_end: OnStepEnd | None = None,
        tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor | np.ndarray | list[Image.Image]:
        """B samples of one task, with the noise of each -> latents or images; the settings default as in the call.

        Args:
            paste_back: put edits back into their sources, at the sources' own resolution, which needs "pil".
            context: of `encode_prompt`, in place of the prompts, which are not read then.
            negative: B negative prompts, or their context.
            on_step_end, tensor_inputs: `callback_on_step_end` and what it is given, of `TENSORS`.

        Returns float32 [B, 4, h, w] for the output type "latent", float32 [B, 3, H, W] in [0, 1] for "pt", float32
        [B, H, W, 3] for "np", else B RGB images. With a mask or `paste_back`, as `compositing.finish` makes them.
        Raises ValueError for samples of several tasks and for markers that don't match the references.
        """
        inputs = self.prepare(samples, noise, read=context is None)  # token ids; images [R, 224, 224, 3], [R, H, W, 3]
        condition = self.encode(inputs, context)  # context [B, L, 4096], source [B, 4, h, w]; the same for all steps
        if negative is not None and not isinstance(negative, Context):
            negative = encode_text(self.model, self.tokenizer, inputs.task, negative, self._execution_device)
        guidance = Guidance(inputs.task, text_guidance, source_guidance)
        mask = self._mask(samples, noise)  # [B, 1, h, w]
        latents = self.denoise(condition, noise, guidance, steps=steps, on_step=on_step, reuse=reuse, mask_B1HW=mask,
                               negative=negative, on_step_end=on_step_end, tensor_inputs=tensor_inputs)  # fmt: skip
        _require_finite(latents)
        if output_type == "latent":
            return latents
        pixels = self.decode(latents)  # [B, 3, H, W]
        if output_type == "pil":
            made = images.to_pil(pixels)
            return [finish(image, sample, paste_back) for image, sample in zip(made, samples, strict=True)]
        if mask is not None:  # the source's 8 bits outside it
            made = [finish(*one, False) for one in zip(images.to_pil(pixels), samples, strict=True)]
            pixels = torch.stack([images.to_pixels(image) for image in made])
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _mask(self, samples: Sequence[Sample], noise: Sequence[SampleNoise]) -> Tensor | None:
        """Where latents may differ from their source, on the pipeline's device; None where nothing is held."""
        if all(sample.mask is None for sample in samples):
            return None
        parts = [mask_of_latent(s, n.latent.shape, self.sizes.cell) for s, n in zip(samples, noise, strict=True)]
        return torch.stack(parts).to(self._execution_device)

    def prepare(self, samples: Sequence[Sample], noise: Sequence[SampleNoise], *, read: bool = True) -> Inputs:
        """Tokenise prompts and fit images, on the CPU; arguments and errors as `inputs.prepare`."""
        return prepare(samples, noise, self.tokenizer, self.image_encoder.config.image_size, self.sizes.cell, read=read)

    @torch.no_grad()
    def encode(self, inputs: Inputs, context: Context | None = None) -> Condition:
        """Images and prompts through VAE, vision tower, Q-Former, fusion and T5, on the pipeline's device.

        context: [B, L, C], in place of that of the prompts; only the sources are encoded then.
        """
        return encode_inputs(self._compile_ends(self.model), self.vae, inputs, self._execution_device, context)

    @torch.no_grad()
    def denoise(
        self,
        condition: Condition,
        noise: Sequence[SampleNoise],
        guidance: Guidance,
        *,
        steps: int | None = None,
        on_step: solver.OnStep | None = None,
        reuse: int = 1,
        mask_B1HW: Tensor | None = None,
        negative: Context | None = None,
        on_step_end: OnStepEnd | None = None,
        tensor_inputs: Sequence[str] = ("latents",),
    ) -> Tensor:
        """Conditions and noise of B samples -> final latents, float32 [B, 4, h, w].

        Args:
            guidance: decides which branches the DiT is evaluated for, and how they are summed.
            steps: of the scheduler; None: as `settings.resolve` says.
            mask_B1HW: float [B, 1, h, w]; where it is 0, every step leads to the source.
            on_step, reuse: as in the call. negative, on_step_end, tensor_inputs: as in `run`.

        Raises ValueError for steps below 1, `reuse` without `compile`, guidance beside one that is in the weights, and
        for a mask with a scheduler that has no betas.
        """
        config, task = self.scheduler.config, guidance.task
        if mask_B1HW is not None and not isinstance(getattr(self.scheduler, "betas", None), Tensor):
            raise ValueError(f"{type(self.scheduler).__name__} has no betas, which a mask needs: use another scheduler")
        how = settings.resolve(config, task, steps, guidance.text, guidance.source)
        start = torch.stack([n.latent for n in noise]).to(self._execution_device)
        times = solver.model_times(self.scheduler, how.steps)
        condition, negative = _alike(condition, negative)
        null_LC = self.model.null_context.to(condition.context_BLC)

        def build(condition: Condition, negative: Context | None, branches: list[Branch]) -> solver.Denoise:
            stacked = stack(condition, branches, null_LC, negative).drop_full_mask()
            estimate = self._estimate(stacked, branches, times, reuse)
            if mask_B1HW is None:
                return estimate
            return hold(estimate, mask_B1HW, condition.source_BCHW, solver.log_alphas(self.scheduler.betas))

        estimate = Denoising(build, condition, negative, how)
        self._guidance_scale, self._image_guidance_scale = how.guidance, how.source_guidance
        self._num_timesteps, self._interrupt = len(times), False
        with self.progress_bar(total=how.steps) as progress:

            def advance(step: int, x: Tensor, x0: Tensor) -> Tensor | None:
                progress.update()
                if on_step is not None:
                    on_step(step, x, x0)
                if on_step_end is None:
                    return None
                given = estimate.tensors(tensor_inputs, x, null_LC)
                changed = estimate.take(given, on_step_end(self, step, estimate.time, dict(given)) or {})
                scales = self._guidance_scale, self._image_guidance_scale
                if scales != (estimate.how.guidance, estimate.how.source_guidance):
                    estimate.rescale(settings.resolve(config, task, how.steps, *scales))
                if self._interrupt:
                    raise Interrupted(x if changed is None else changed)
                return changed

            seeds = [n.step_seed for n in noise]
            try:
                return solver.sample(self.scheduler, estimate, start, how.steps, seeds, advance)
            except Interrupted as stop:
                return stop.latents

    def _estimate(self, stacked: Condition, branches: list[Branch], times: Tensor, reuse: int) -> solver.Denoise:
        """The guided noise estimate under a condition of all branches."""
        if reuse < 1 or (reuse > 1 and not self.is_compiled):
            raise ValueError(f"reuse must be 1, or more with compile=True, got {reuse}")
        model = self.model
        if not self.is_compiled:
            return guided_estimate(model, stacked, branches)
        if self._fast is None or not self._fast.serves(self.transformer):
            self._fast = FastDenoiser(self.transformer, model.timestep_dtype)
        return self._fast.start(stacked, branches, times, reuse)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Final latents, float [B, 4, h, w] -> pixels, float32 [B, 3, H, W], about [-1, 1]."""
        return decode(self.vae, latents_BCHW).float()

    @property
    def sizes(self) -> SizeGrid:
        """The sizes of images that the model makes."""
        return SizeGrid.of(self.vae.config, self.transformer.config)

    @property
    def native_size(self) -> int:
        """Side in pixels of the images the DiT was trained on, and of all references (512)."""
        return self.sizes.native

    def output_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width, px, with the native size for None; raises ValueError for a size off the grid."""
        return self.sizes.resolve(height, width)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the latent of an output of this size, px; raises ValueError for a size off the grid."""
        return self.sizes.latent_shape(height, width)

    def draw_noise(
        self, task: Task, references: int, generator: torch.Generator, height: int, width: int
    ) -> SampleNoise:
        """The random numbers of a sample of this size, px, from its own CPU generator: alike on every device."""
        shape, reference_shape = self.latent_shape(height, width), self.sizes.reference_shape(task, height, width)
        return draw_sample_noise(shape, [reference_shape] * references, generator)


def _alike(condition: Condition, negative: Context | None) -> tuple[Condition, Context | None]:
    """A condition and its negative context on one device and of one length."""
    if negative is None:
        return condition, None
    length = max(condition.context_BLC.shape[1], negative.context_BLC.shape[1])
    read = Context(condition.context_BLC, condition.mask_BL).pad(length)
    like = condition.context_BLC
    negative = Context(negative.context_BLC.to(like), negative.mask_BL.to(like.device)).pad(length)
    return replace(condition, context_BLC=read.context_BLC, mask_BL=read.mask_BL), negative


def _require_finite(latents_BCHW: Tensor) -> None:
    """Raise ValueError naming the samples that came out as NaN or infinite."""
    finite_B = latents_BCHW.isfinite().flatten(1).all(1)
    if not finite_B.all():
        bad = (~finite_B).nonzero().flatten().tolist()
        raise ValueError(
            f"samples {bad} of {len(finite_B)} came out as NaN or infinite: give less guidance or a wider dtype"
        )

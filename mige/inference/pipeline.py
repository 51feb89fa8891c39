"""MIGEPipeline: prompts and images in, images out, as a diffusers pipeline.

    pipe = MIGEPipeline.from_pretrained("output/pretrained_models/mige", dtype=torch.bfloat16).to("cuda")
    image = pipe("a<imagehere>in the jungle", [dog], seed=0).images[0]
    image = pipe("make the sky night in<imagehere>", source=photo).images[0]
    image = pipe("replace the pencil in<imagehere>with<imagehere>", [photo, pen], source=photo).images[0]

What happens is `MIGEPipeline.run`. Letters: B prompts, L context positions; latents are [B, 4, h, w], images 8 h high.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, PixArtTransformer2DModel, SchedulerMixin
from PIL import Image
from torch import Tensor
from transformers import Blip2QFormerModel, Blip2VisionModel, PreTrainedTokenizerBase, T5EncoderModel

import mige.fusion
import mige.sampler  # noqa: F401 - folders of version 0.1.0 name these two, and diffusers opens only imported ones
from mige.checkpoints import folder as checkpoint
from mige.diffusion import few_step, solver  # noqa: F401 - diffusers opens a scheduler's imported module
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch, Guidance, stack
from mige.diffusion.settings import resolve
from mige.inference import arguments, loading
from mige.inference.denoising import guided_estimate
from mige.inference.encoding import encode_inputs
from mige.inference.inputs import Inputs, prepare
from mige.inference.modes import Modes
from mige.inference.samples import Sample, SampleNoise, draw_sample_noise
from mige.inference.sizes import SizeGrid
from mige.models.encoder import prepare_vision_tower, set_product_dtype
from mige.models.fast_dit import FastDenoiser
from mige.models.fusion import MIGEFusion
from mige.models.mige import MIGEModel
from mige.models.vae import decode
from mige.tasks import Task
from mige.utils import images


class MIGEPipeline(Modes, DiffusionPipeline):
    """The eight parts of a checkpoint folder, run in order. `from_pretrained` and `save_pretrained` are diffusers'.

    The scheduler may be replaced by any diffusers scheduler that predicts epsilon. The class is longer than others as
    diffusers wants loading, the call and its steps in one; what a step does stands in a file of its own.
    """

    model_cpu_offload_seq = "image_encoder->qformer->fusion->text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: PixArtTransformer2DModel,
        text_encoder: T5EncoderModel,
        image_encoder: Blip2VisionModel,
        qformer: Blip2QFormerModel,
        fusion: MIGEFusion,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
    ):
        super().__init__()
        prepare_vision_tower(image_encoder)
        self.register_modules(
            vae=vae,
            transformer=transformer,
            text_encoder=text_encoder,
            image_encoder=image_encoder,
            qformer=qformer,
            fusion=fusion,
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        self._fast = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | dict | None = None,
        torch_dtype: torch.dtype | dict | None = None,
        compile: bool = False,
        variant: str | None = None,
        subfolder: str | None = None,
        verified: bool = False,
        **options,
    ) -> "MIGEPipeline":
        """Load a checkpoint folder, or a model of the hub by name.

        Args:
            compile: as `MIGEPipeline.compile` does.
            dtype: float32 if None. A half-precision dtype is taken as the weights were trained: VAE float32, vision
                tower in the dtype its products ran in, the rest as given. A dict names the dtype of each part, as in
                diffusers ("default" for those it leaves out).
            torch_dtype: another name of `dtype`.
            variant: such as "fp16", of the weight files' names. subfolder: of the folder or model.
            verified: the caller has just verified this folder: do not do it again.
            options: the hub's (`loading.HUB`), diffusers' (`loading.LOADING`), or a part to take instead.

        Raises CheckpointError if a part, a key or a shape is not as its config says, or nothing lies there;
        TypeError for an unknown option, for two dtypes and for what is no float dtype.
        """
        parts = cls._get_signature_keys(cls)[0]
        loading.check_options(options, parts)
        dtype, as_trained = loading.resolve_dtype(dtype, torch_dtype, parts)
        hub = {name: options.pop(name, None) for name in loading.HUB}
        folder = cls.locate(path, variant=variant, **hub)
        folder = folder / subfolder if subfolder else folder
        if not verified:
            checkpoint.verify(folder, variant)
        if variant is not None:
            options["variant"] = variant
        pipeline = super().from_pretrained(str(folder), dtype=dtype, **options)
        pipeline.transformer.pos_embed.to(pipeline.transformer.dtype)  # its table is computed in float32
        if as_trained:
            set_product_dtype(pipeline.image_encoder, getattr(torch, pipeline.fusion.config.vision_dtype))
        if compile:
            pipeline.compile()
        return pipeline

    @classmethod
    def locate(cls, path: str | Path, **hub) -> Path:
        """The folder of a checkpoint, or of a model of the hub: `loading.locate` with diffusers' own download."""
        return loading.locate(path, cls.download, **hub)

    @property
    def model(self) -> MIGEModel:
        """The parts that compute, as the one module that training uses."""
        return MIGEModel(self.image_encoder, self.qformer, self.fusion, self.text_encoder, self.transformer)

    def with_weights(self, state: Mapping[str, Tensor]) -> "MIGEPipeline":
        """A pipeline of the same parts that holds a whole `MIGEModel` state dict (gathered, where it was sharded).

        Raises RuntimeError for a key that is missing, unexpected or of another shape.
        """
        return MIGEPipeline(**(self.components | loading.exchange_weights(self.components, state)))

    @property
    def sizes(self) -> SizeGrid:
        """The sizes of images that the model makes."""
        return SizeGrid.of(self.vae.config, self.transformer.config)

    @property
    def native_size(self) -> int:
        """Side in pixels of the images the DiT was trained on, and of all references (512)."""
        return self.sizes.native

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: Any = None,
        source: Any = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        source_guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        output_type: str = "pil",
        on_step: solver.OnStep | None = None,
        reuse: int = 1,
    ) -> ImagePipelineOutput:
        """Generate or edit. The task follows from the images: no source, subject-driven generation; a source that is
        the only image, editing; else subject-driven editing, with the source among the references.

        Args:
            prompt: one, or a list; `<imagehere>` stands for the references, in order.
            references: the images of the prompt, or the only one; a list with that for each of several prompts.
            source: the image to edit; a list for several prompts. Images are paths, PIL images, arrays or tensors
                (`as_image`); a source that equals a reference is that reference.
            height, width: of the output in pixels, multiples of 16; the native size by default.
            num_inference_steps, guidance_scale, source_guidance_scale: by default the official ones of the task; a
                few-step student has its own, and no guidance beside the one in its weights.
            seed: of the noise; for several prompts one each, or one that all samples share.
            output_type: "pil", "pt" (float [B, 3, H, W] in [0, 1]) or "latent".
            on_step: called after every step with (step, latent, estimate of the final latent).
            reuse: compute the DiT's middle blocks every so many steps, an approximation; needs `compile`.

        Raises ValueError, before anything runs, for an argument that is not what it should be, and for markers that
        don't match the references.
        """
        steps, text, source_scale = arguments.numbers_of(num_inference_steps, guidance_scale, source_guidance_scale)
        reuse = arguments.number("reuse", reuse, whole=True, least=1)
        arguments.check_run(self.scheduler, output_type, on_step, reuse, self.is_compiled)
        samples = arguments.samples_of(prompt, references, source)
        seeds = arguments.seeds_of(seed, len(samples))
        resolve(self.scheduler.config, samples[0].task, steps, text, source_scale)  # refuses, if it must
        size = self.output_size(*arguments.sides_of(height, width))
        noise = [
            self.draw_noise(sample.task, len(sample.references), torch.Generator().manual_seed(one), *size)
            for sample, one in zip(samples, seeds, strict=True)
        ]
        result = self.run(samples, noise, steps=steps, text_guidance=text, source_guidance=source_scale,
                          on_step=on_step, reuse=reuse, output_type=output_type)  # fmt: skip
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result)

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
    ) -> Tensor | list[Image.Image]:
        """B samples of one task, with the noise of each -> latents or images; the settings default as in the call.

        Returns float32 [B, 4, h, w] for the output type "latent", float32 [B, 3, H, W] in [0, 1] for "pt", else B RGB
        images. Raises ValueError for samples of several tasks and for markers that don't match the references.
        """
        inputs = self.prepare(samples, noise)  # token ids; images [R, 224, 224, 3] and [R, H, W, 3]
        condition = self.encode(inputs)  # context [B, L, 4096], source [B, 4, h, w]; the same for all steps
        guidance = Guidance(inputs.task, text_guidance, source_guidance)
        latents = self.denoise(condition, noise, guidance, steps=steps, on_step=on_step, reuse=reuse)  # [B, 4, h, w]
        if output_type == "latent":
            return latents
        pixels = self.decode(latents)  # [B, 3, H, W]
        return images.to_pil(pixels) if output_type == "pil" else (pixels / 2 + 0.5).clamp(0, 1)

    def prepare(self, samples: Sequence[Sample], noise: Sequence[SampleNoise]) -> Inputs:
        """Tokenise prompts and fit images, on the CPU; arguments and errors as `inputs.prepare`."""
        return prepare(samples, noise, self.tokenizer, self.image_encoder.config.image_size, self.sizes.cell)

    @torch.no_grad()
    def encode(self, inputs: Inputs) -> Condition:
        """Images and prompts through VAE, vision tower, Q-Former, fusion and T5, on the pipeline's device."""
        return encode_inputs(self._compile_ends(self.model), self.vae, inputs, self._execution_device)

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
    ) -> Tensor:
        """Conditions and noise of B samples -> final latents, float32 [B, 4, h, w].

        Args:
            guidance: decides which branches the DiT is evaluated for, and how they are summed.
            steps: of the scheduler; None: as `settings.resolve` says.
            on_step, reuse: as in the call.

        Raises ValueError for steps below 1, `reuse` without `compile`, guidance beside one that is in the weights.
        """
        how = resolve(self.scheduler.config, guidance.task, steps, guidance.text, guidance.source)
        start = torch.stack([n.latent for n in noise]).to(self._execution_device)
        estimate = self._estimate(condition, how.branches, how.steps, reuse)
        with self.progress_bar(total=how.steps) as progress:

            def advance(step: int, x: Tensor, x0: Tensor) -> None:
                progress.update()
                if on_step is not None:
                    on_step(step, x, x0)

            return solver.sample(self.scheduler, estimate, start, how.steps, [n.step_seed for n in noise], advance)

    def _estimate(self, condition: Condition, branches: list[Branch], steps: int, reuse: int) -> solver.Denoise:
        """The guided noise estimate under a condition."""
        if reuse < 1 or (reuse > 1 and not self.is_compiled):
            raise ValueError(f"reuse must be 1, or more with compile=True, got {reuse}")
        model = self.model
        stacked = stack(condition, branches, model.null_context.to(condition.context_BLC)).drop_full_mask()
        if not self.is_compiled:
            return guided_estimate(model, stacked, branches)
        if self._fast is None or not self._fast.serves(self.transformer):
            self._fast = FastDenoiser(self.transformer, model.timestep_dtype)
        return self._fast.start(stacked, branches, solver.model_times(self.scheduler, steps), reuse)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Final latents, float [B, 4, h, w] -> pixels, float32 [B, 3, H, W], about [-1, 1]."""
        return decode(self.vae, latents_BCHW).float()

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

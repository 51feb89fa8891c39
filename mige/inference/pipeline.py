"""MIGEPipeline: prompts and images in, images out, as a diffusers pipeline.

    pipe = MIGEPipeline.from_pretrained("output/pretrained_models/mige", dtype=torch.bfloat16).to("cuda")
    image = pipe("a<imagehere>in the jungle", [dog], seed=0).images[0]
    image = pipe("make the sky night in<imagehere>", source=photo).images[0]
    image = pipe("replace the pencil in<imagehere>with<imagehere>", [photo, pen], source=photo).images[0]

What happens is `Steps.run`. Letters: B prompts, N images of each, L context positions; latents are [B N, 4, h, w],
images 8 h high.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, PixArtTransformer2DModel, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from transformers import Blip2QFormerModel, Blip2VisionModel, PreTrainedTokenizerBase, T5EncoderModel

import mige.fusion
import mige.sampler  # noqa: F401 - folders of version 0.1.0 name these two, and diffusers opens only imported ones
from mige.checkpoints import folder as checkpoint
from mige.diffusion import few_step, solver  # noqa: F401 - diffusers opens a scheduler's imported module
from mige.diffusion.conditioning import Context
from mige.inference import loading
from mige.inference.adapters import Adapters
from mige.inference.call import Call, read_call
from mige.inference.denoising import OnStepEnd
from mige.inference.encoding import encode_text
from mige.inference.inputs import read_prompts
from mige.inference.modes import Modes
from mige.inference.saving import Saving
from mige.inference.steps import Steps
from mige.models.encoder import prepare_vision_tower, set_product_dtype
from mige.models.fusion import MIGEFusion
from mige.models.mige import MIGEModel
from mige.models.vae import downscale


class MIGEPipeline(Saving, Steps, Modes, Adapters, DiffusionPipeline):
    """The eight parts of a checkpoint folder, run in order. `from_pretrained` and `save_pretrained` are diffusers'.

    The scheduler may be replaced by any diffusers scheduler that predicts epsilon. `image_processor` makes the outputs
    "np" and "pt"; `vae_scale_factor`: px of a latent cell along one side (8).
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
        self.vae_scale_factor = downscale(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

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
            options: the hub's (`loading.HUB`), diffusers' (`loading.LOADING`; a `PipelineQuantizationConfig` of torchao
                or bitsandbytes, part by part, is `quantization_config`), or a part to take instead.

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

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        references: Any = None,
        source: Any = None,
        *,
        image: Any = None,
        mask: Any = None,
        size: str | None = None,
        height: int | None = None,
        width: int | None = None,
        long_side: int | None = None,
        paste_back: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        source_guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        on_step: solver.OnStep | None = None,
        reuse: int = 1,
    ) -> ImagePipelineOutput | tuple:
        """Generate or edit. The task follows from the images: no source, subject-driven generation; a source that is
        the only image, editing; else subject-driven editing, with the source among the references.

        Args:
            prompt: one, or a list; `<imagehere>` stands for the references, in order.
            references: the images of the prompt, or the only one; a list with that for each of several prompts.
            source, image: the image to edit; a list for several prompts. Images are paths, PIL images, arrays or
                tensors (`as_image`); a source that equals a reference is that reference.
            mask: white where the source may change: an image, array or path of the source's size, upright, or an array
                of truth values. Outside it the result equals the source bit for bit: as it was fitted to the output,
                or, with `paste_back`, as it is.
            size: "source" (the default): an edit has its source's aspect ratio, all of it and the native area, anything
                else the native square; "native": that square, cut from the source's centre; "3:2"; "768x512".
            height, width: of the output in pixels, multiples of 16, in place of `size`; the source is cut to it.
            long_side: most pixels of the longer side, in place of the native area.
            paste_back: the result of an edit at its source's own resolution, what was cut off as it was.
            num_inference_steps, guidance_scale, source_guidance_scale: by default the official ones of the task; a
                few-step student has its own, and no guidance beside the one in its weights.
            image_guidance_scale: another name of `source_guidance_scale`.
            negative_prompt: what the branches of guidance without the prompt read, words alone, behind the task's
                prefix; by default the learnt null context, as in training, which never saw a negative prompt.
            num_images_per_prompt: N; the images of a prompt come one after the other.
            seed: of the noise, 0 by default; one that all prompts share, one a prompt or one an image. The further
                images of a prompt take the seeds after its own.
            generator: in place of a seed: one that the images draw from in turn, or a list of one an image.
            latents: in place of the noise that denoising starts from, standard normal, [B N, 4, h, w].
            prompt_embeds, prompt_attention_mask: of `encode_prompt`, in place of the prompt: [B, L, C] and [B, L].
                References are then not read; they only say how many random numbers were drawn for them.
            negative_prompt_embeds, negative_prompt_attention_mask: the same of the negative prompt.
            output_type: "pil", "np" (float [B N, H, W, 3] in [0, 1]), "pt" (float [B N, 3, H, W]) or "latent".
            return_dict: False: a tuple that holds the images.
            callback_on_step_end: called after every step with (pipe, step, time, tensors); what it returns of them,
                changed, takes their place. It may change `pipe._guidance_scale`, and set `pipe._interrupt` to end.
            callback_on_step_end_tensor_inputs: names of `pipe._callback_tensor_inputs`.
            on_step: called after every step with (step, latent, estimate of the final latent).
            reuse: compute the DiT's middle blocks every so many steps, an approximation; needs `compile`.

        Raises ValueError, before anything runs, for an argument that is not what it should be, and for markers that
        don't match the references.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "return_dict", "__class__")}
        call = self.check_inputs(**given)
        made = self.run(call.samples, self._noise(call), **call.settings)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def check_inputs(self, prompt: str | Sequence[str] | None = None, **given: Any) -> Call:
        """The arguments of a call as `run` takes them; errors as a call's, and TypeError for one that it has not."""
        if unknown := sorted(given.keys() - DEFAULTS.keys()):
            raise TypeError(f"a call has no argument {unknown[0]!r}, expected some of {', '.join(DEFAULTS)}")
        text = self.fusion.config.max_tokens, self.fusion.config.text_width
        call = read_call(DEFAULTS | given | {"prompt": prompt}, self.sizes, self.scheduler, self.is_compiled, text)
        if prompt is None:  # its context is given
            return call
        read = read_prompts(call.samples, self.tokenizer, self.fusion.config.num_queries, text[0])
        return replace(call, samples=read)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        references: Any = None,
        source: Any = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        size: str | None = None,
        height: int | None = None,
        width: int | None = None,
        long_side: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The context of prompts with their images, as a call with the same arguments makes it.

        Returns prompt_embeds [B N, L, C], prompt_attention_mask [B N, L], negative_prompt_embeds and
        negative_prompt_attention_mask, those of the null context where there is no negative prompt. Errors as a call's.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "negative_prompt")}
        call = self.check_inputs(**given)
        inputs = self.prepare(call.samples, self._noise(call))
        condition = self.encode(inputs)
        context_BLC, mask_BL = condition.context_BLC, condition.mask_BL
        if negative_prompt is None:
            null_LC = self.model.null_context[: context_BLC.shape[1]].to(context_BLC)
            negative = Context(null_LC.expand_as(context_BLC).clone(), mask_BL)
        else:
            texts = self.check_inputs(**given, negative_prompt=negative_prompt).settings["negative"]
            negative = encode_text(self.model, self.tokenizer, inputs.task, texts, self._execution_device)
        self.maybe_free_model_hooks()
        return context_BLC, mask_BL, negative.context_BLC, negative.mask_BL

    def _noise(self, call: Call) -> list:
        """The random numbers of a call's samples, drawn in their order."""
        drawn = [
            self.draw_noise(sample.task, len(sample.references), generator, *call.shape.size)
            for sample, generator in zip(call.samples, call.generators, strict=True)
        ]
        return call.with_latents(drawn)


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MIGEPipeline.__call__).parameters.items()
    if parameter.default is not parameter.empty
}
"""The arguments of a call that nobody gave."""

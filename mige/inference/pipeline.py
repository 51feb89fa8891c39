"""MIGEPipeline: prompts and pictures in, pictures out, as a diffusers pipeline.

    pipe = MIGEPipeline.from_pretrained("output/pretrained_models/mige", dtype=torch.bfloat16).to("cuda")
    image = pipe("a<imagehere>in the jungle", [dog], seed=0).images[0]
    image = pipe("make the sky night in<imagehere>", source=photo).images[0]
    image = pipe("replace the pencil in<imagehere>with<imagehere>", [photo, pen], source=photo).images[0]

Letters: B prompts, R pictures of all prompts; latents are [B, 4, h, w], pictures a side of 8 h.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    PixArtTransformer2DModel,
    SchedulerMixin,
)
from torch import Tensor
from transformers import Blip2QFormerModel, Blip2VisionModel, PreTrainedTokenizerBase, T5EncoderModel

import mige.fusion
import mige.sampler  # noqa: F401 - folders of version 0.1.0 name these two, and diffusers opens only imported ones
from mige.checkpoints import folder as checkpoint
from mige.diffusion import few_step, guidance, settings  # noqa: F401 - diffusers opens a scheduler's imported module
from mige.diffusion import solver as sampler
from mige.diffusion.conditioning import Condition
from mige.inference import arguments, loading
from mige.inference.offload import stream_blocks
from mige.inference.quantise import quantise
from mige.inference.samples import Picture, Sample, SampleNoise
from mige.models import vae as latents
from mige.models.encoder import prepare_vision_tower, set_product_dtype
from mige.models.fast_dit import FastDenoiser
from mige.models.fusion import MIGEFusion
from mige.models.instruction import MAX_WORDS, Instruction, full_text, tokenize
from mige.models.mige import MODEL_PREFIXES, MIGEModel
from mige.tasks import TASKS, Task, placeholders
from mige.utils import images


class MIGEPipeline(DiffusionPipeline):
    """The eight parts of a checkpoint folder, run in order. `from_pretrained` and `save_pretrained` are diffusers'.

    The scheduler may be replaced by any diffusers scheduler that predicts epsilon.
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
        self.is_compiled, self._fast = False, None

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
        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise TypeError(f"dtype is {dtype} and torch_dtype {torch_dtype}: they are one option, give one of them")
        dtype = torch_dtype if dtype is None else dtype
        parts = cls._get_signature_keys(cls)[0]
        loading.check_options(options, parts)
        loading.check_dtype(dtype, parts)
        hub = {name: options.pop(name, None) for name in loading.HUB}
        folder = cls.locate(path, variant=variant, **hub)
        folder = folder / subfolder if subfolder else folder
        if not verified:
            checkpoint.verify(folder, variant)
        dtype = torch.float32 if dtype is None else dtype  # or transformers would take that of the file, diffusers not
        as_trained = isinstance(dtype, torch.dtype) and dtype.itemsize < 4
        if as_trained:
            dtype = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
        if variant is not None:
            options["variant"] = variant
        pipeline = super().from_pretrained(str(folder), dtype=dtype, **options)
        pipeline.transformer.pos_embed.to(pipeline.transformer.dtype)  # its table is computed in float32
        if as_trained:
            set_product_dtype(pipeline.image_encoder, getattr(torch, pipeline.fusion.config.vision_dtype))
        if compile:
            pipeline.compile()
        return pipeline

    def compile(self) -> None:
        """Denoise with `FastDenoiser` from now on: the same result but for rounding, one CUDA graph a step.

        It reads the transformer's weights when the first picture is made: change them before (adapters, for one).
        """
        self.is_compiled = True

    def halve_vae(self) -> None:
        """The VAE in bfloat16, channels last: faster, and pictures differ by rounding (docs/inference.md)."""
        self.vae.to(torch.bfloat16).to(memory_format=torch.channels_last)

    def quantise_text_encoder(self, bits: int) -> None:
        """Keep T5's matrices in 8 or 4 bits a value, rounded (`mige.inference.quantise`); call before off-loading."""
        quantise(self.text_encoder.encoder.block, bits)

    def offload_encoders(self, device: torch.device | str) -> None:
        """In place of `.to(device)`: DiT, VAE and fusion there, the blocks of the encoders in host memory.

        A block is on the device only while it computes, once a batch: the same pictures in far less memory.
        """
        streamed = ("text_encoder", "image_encoder", "qformer")
        stream_blocks([getattr(self, part) for part in streamed], self.model.blocks(streamed), torch.device(device))
        for part in (self.fusion, self.transformer, self.vae):
            part.to(device)

    @classmethod
    def locate(cls, path: str | Path, **hub) -> Path:
        """`loading.locate` with diffusers' own download."""
        return loading.locate(path, cls.download, **hub)

    @property
    def model(self) -> MIGEModel:
        """The parts that compute, as the one module that training uses."""
        return MIGEModel(self.image_encoder, self.qformer, self.fusion, self.text_encoder, self.transformer)

    def with_weights(self, state: Mapping[str, Tensor]) -> "MIGEPipeline":
        """A pipeline of the same parts that holds a whole `MIGEModel` state dict (gathered, where it was sharded)."""
        parts = {}
        for name, prefix in MODEL_PREFIXES.items():
            part = getattr(self, name)
            with torch.device("meta"):
                fresh = part.from_config(part.config) if isinstance(part, ModelMixin) else type(part)(part.config)
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            fresh.load_state_dict(own, assign=True)
            for path, buffer in part.named_buffers():  # tables that no state dict holds
                module, _, buffer_name = path.rpartition(".")
                if fresh.get_buffer(path).is_meta:
                    setattr(fresh.get_submodule(module), buffer_name, buffer)
            if name == "text_encoder":
                fresh.tie_weights()
            parts[name] = fresh
        return MIGEPipeline(**(self.components | parts))

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures the DiT was trained on, and of all references (512)."""
        return self.transformer.config.sample_size * latents.downscale(self.vae)

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
        on_step: sampler.OnStep | None = None,
        reuse: int = 1,
    ) -> ImagePipelineOutput:
        """Generate or edit. The task follows from the pictures: no source, subject-driven generation; a source that is
        the only picture, editing; else subject-driven editing, with the source among the references.

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
        if output_type not in ("pil", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'pt' or 'latent', got {output_type!r}")
        num_inference_steps = arguments.optional("num_inference_steps", num_inference_steps, whole=True, least=1)
        guidance_scale = arguments.optional("guidance_scale", guidance_scale, least=0)
        source_guidance_scale = arguments.optional("source_guidance_scale", source_guidance_scale, least=0)
        reuse = arguments.number("reuse", reuse, whole=True, least=1)
        height = arguments.optional("height", height, whole=True)
        width = arguments.optional("width", width, whole=True)
        arguments.check_run(self.scheduler, on_step, reuse, self.is_compiled)
        samples = arguments.samples_of(prompt, references, source)
        seeds = arguments.seeds_of(seed, len(samples))
        size = self.output_size(height, width)
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        noise = [
            self.draw_noise(sample.task, len(sample.references), generator, *size)
            for sample, generator in zip(samples, generators, strict=True)
        ]
        result = self.run(
            samples,
            noise,
            steps=num_inference_steps,
            text_guidance=guidance_scale,
            source_guidance=source_guidance_scale,
            on_step=on_step,
            reuse=reuse,
        )
        if output_type != "latent":
            pixels = self.decode(result)
            result = images.to_pil(pixels) if output_type == "pil" else (pixels / 2 + 0.5).clamp(0, 1)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result)

    def output_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width with the native size for None; raises ValueError for a size off the grid."""
        size = tuple(self.native_size if side is None else side for side in (height, width))
        self.latent_shape(*size)
        return size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape of the latent of an output of this size; raises ValueError for a size off the grid (16 px)."""
        cell = latents.downscale(self.vae)
        grid = cell * self.transformer.config.patch_size
        if height < grid or width < grid or height % grid or width % grid:
            raise ValueError(f"height and width must be multiples of {grid} px, got {height} x {width}")
        return self.vae.config.latent_channels, height // cell, width // cell

    def draw_noise(
        self, task: Task, references: int, generator: torch.Generator, height: int, width: int
    ) -> SampleNoise:
        """A sample's random numbers from its own CPU generator, in a fixed order: alike on every device."""
        latent = self.latent_shape(height, width)
        shape = self.reference_shape(task, height, width)
        return SampleNoise(
            torch.randn(latent, generator=generator),
            tuple(torch.randn(shape, generator=generator) for _ in range(references)),
            torch.randn(latent, generator=generator),
            int(torch.randint(2**63 - 1, (), generator=generator)),
        )

    def reference_shape(self, task: Task, height: int, width: int) -> tuple[int, int, int]:
        """Shape of a reference's latent: an edit's is the output's, other references have the native size."""
        size = (height, width) if task is Task.EDIT else (self.native_size, self.native_size)
        return self.latent_shape(*size)

    @torch.no_grad()
    def run(
        self,
        samples: Sequence[Sample],
        noise: Sequence[SampleNoise],
        *,
        steps: int | None = None,
        text_guidance: float | None = None,
        source_guidance: float | None = None,
        on_step: sampler.OnStep | None = None,
        reuse: int = 1,
    ) -> Tensor:
        """Samples of one task -> final latents, float32 [B, 4, h, w]; the settings default as in the call."""
        task = samples[0].task
        if any(sample.task is not task for sample in samples):
            raise ValueError("the samples of one batch must be of one task: guidance and sizes depend on it")
        how = settings.resolve(self.scheduler.config, task, steps, text_guidance, source_guidance)
        condition = self.encode(samples, noise)  # once: it does not depend on the timestep
        return self.denoise(condition, how.branches, noise, how.steps, on_step, reuse)

    @torch.no_grad()
    def denoise(
        self,
        condition: Condition,
        chosen: Sequence[guidance.Branch],
        noise: Sequence[SampleNoise],
        steps: int,
        on_step: sampler.OnStep | None = None,
        reuse: int = 1,
    ) -> Tensor:
        """Conditions and noise of B samples -> final latents, float32 [B, 4, h, w]. Arguments as in the call."""
        start = torch.stack([n.latent for n in noise]).to(self._execution_device)
        estimate = self._estimate(condition, chosen, steps, reuse)
        with self.progress_bar(total=steps) as progress:

            def advance(step: int, x: Tensor, x0: Tensor) -> None:
                progress.update()
                if on_step is not None:
                    on_step(step, x, x0)

            if isinstance(self.scheduler, sampler.DPMSolver2M):
                return self.scheduler.sample(estimate, start, steps, advance)
            generators = [torch.Generator().manual_seed(n.step_seed) for n in noise]
            return sampler.run_scheduler(self.scheduler, estimate, start, steps, generators, advance)

    def _estimate(
        self, condition: Condition, chosen: Sequence[guidance.Branch], steps: int, reuse: int
    ) -> sampler.Denoise:
        """The guided noise estimate under a condition."""
        if reuse < 1 or (reuse > 1 and not self.is_compiled):
            raise ValueError(f"reuse must be 1, or more with compile=True, got {reuse}")
        null = self.model.null_context.to(condition.context_BLC)
        stacked = guidance.stack(condition, chosen, null).without_idle_mask()
        if self.is_compiled:
            if self._fast is None or not self._fast.serves(self.transformer):
                self._fast = FastDenoiser(self.transformer, self.model.timestep_dtype)
            return self._fast.start(stacked, chosen, self._times(steps), reuse)
        model = self.model

        def plain(x_BCHW: Tensor, t: Tensor) -> Tensor:
            repeated = x_BCHW.repeat(len(chosen), 1, 1, 1)
            output = model.denoise(repeated, t.expand(len(repeated)), stacked)  # [branches * B, 8, h, w]
            return guidance.combine(output[:, : x_BCHW.shape[1]], chosen)

        return plain

    def _times(self, steps: int) -> Tensor:
        """The model times the scheduler will ask for, float [steps] (more for a scheduler that asks twice a step)."""
        if isinstance(self.scheduler, sampler.DPMSolver2M):
            return sampler.time_grid(steps, self.scheduler.betas).model_time[:-1]
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps.float()

    def encode(self, samples: Sequence[Sample], noise: Sequence[SampleNoise]) -> Condition:
        """Pictures and prompts of one task -> condition."""
        instructions = [self.instruct(sample) for sample in samples]
        unscaled = self._encode_references(samples, noise)  # [R, 4, h', w']
        source_BCHW = self._encode_sources(samples, noise, unscaled)
        slots = _slots(samples, instructions)
        vision_RCHW = self._vision_pixels(samples)
        return self.model.encode(instructions, _into(slots, vision_RCHW), _into(slots, unscaled), source_BCHW)

    def instruct(self, sample: Sample) -> Instruction:
        """Token ids of a sample's prompt; raises ValueError if its placeholders don't match its references."""
        instruction = tokenize(full_text(sample.task, sample.prompt, sample.edit_type), self.tokenizer)
        read, given = instruction.pictures, len(sample.references)
        rewritten = sample.task is Task.EDIT and not placeholders(sample.prompt)
        if read < given or (read > given and not rewritten):
            raise ValueError(
                f"prompt {sample.prompt!r}: {read} <imagehere>, {given} references; "
                f"write one for each reference (at most {MAX_WORDS} words are read)"
            )
        return instruction

    def _vision_pixels(self, samples: Sequence[Sample]) -> Tensor:
        """All references as the vision tower takes them, [R, 3, 224, 224]."""
        side = self.image_encoder.config.image_size
        pictures = [picture for sample in samples for picture in sample.references]
        pixels = _each(lambda picture: images.vision_pixels(picture, side), pictures)
        return _stack(pixels, (3, side, side)).to(self._execution_device)

    def _encode_references(self, samples: Sequence[Sample], noise: Sequence[SampleNoise]) -> Tensor:
        """Unscaled latents of all references, [R, 4, h', w']: the native size, or the output's if it is edited."""
        draws = [draw for sample_noise in noise for draw in sample_noise.references]
        if not draws:
            return torch.zeros(0, *noise[0].latent.shape, device=self._execution_device)
        fit = images.letterbox if TASKS[samples[0].task].letterbox else images.center_crop
        return self._posterior([p for sample in samples for p in sample.references], fit, draws)

    def _encode_sources(self, samples: Sequence[Sample], noise: Sequence[SampleNoise], references: Tensor) -> Tensor:
        """Scaled latents of the pictures to edit, [B, 4, h, w]; zeros where a picture is made from nothing.

        An edit reads one posterior sample as its reference and as its source; a subject edit draws a second one.
        """
        if samples[0].task is Task.SUBJECT:
            return torch.zeros(len(samples), *noise[0].latent.shape, device=self._execution_device)
        if samples[0].task is Task.EDIT:
            return latents.scale(self.vae, references)
        sources = self._posterior([s.source for s in samples], images.center_crop, [n.source for n in noise])
        return latents.scale(self.vae, sources)

    def _posterior(
        self, pictures: Sequence[Picture], fit: Callable[[Picture, int, int], Picture], draws: Sequence[Tensor]
    ) -> Tensor:
        """One sample of the VAE's posterior of each picture, fitted to the size of its draw."""
        height, width = (side * latents.downscale(self.vae) for side in draws[0].shape[1:])
        pixels = torch.stack(_each(lambda picture: images.to_pixels(fit(picture, height, width)), pictures))
        moments = latents.encode(self.vae, pixels.to(self._execution_device))
        return moments.sample(torch.stack(list(draws)).to(self._execution_device))

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Final latents -> pixels, float32 [B, 3, H, W], about [-1, 1]."""
        return latents.decode(self.vae, latents_BCHW).float()


def _slots(samples: Sequence[Sample], instructions: Sequence[Instruction]) -> list[int | None]:
    """For every picture slot of the instructions, the number of its reference among all; None for an empty slot.

    Only an edit has empty ones: a prompt that mentions the picture again, as the official rewriting makes of two of
    Emu Edit's, reads an all-zero picture there.
    """
    slots, first = [], 0
    for sample, instruction in zip(samples, instructions, strict=True):
        many = len(sample.references)
        slots += [first + slot if slot < many else None for slot in range(instruction.pictures)]
        first += many
    return slots


def _into(slots: Sequence[int | None], values_R: Tensor) -> Tensor:
    """[R, ...] -> [slots, ...], zeros in the empty ones."""
    if not slots:
        return values_R
    zero = torch.zeros_like(values_R[0])
    return torch.stack([zero if slot is None else values_R[slot] for slot in slots])


def _each(function: Callable[[Picture], Tensor], pictures: Sequence[Picture]) -> list[Tensor]:
    """The function of every picture, in threads: resizing leaves the interpreter free, and the GPU waits for it."""
    with ThreadPoolExecutor(min(8, max(1, len(pictures)))) as pool:
        return list(pool.map(function, pictures))


def _stack(tensors: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(list(tensors)) if tensors else torch.zeros(0, *shape)

"""The four nodes: load a model, add adapters to it, say what is wanted, make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from mige.tasks import Task

from . import names
from .images import to_images, to_masks, to_tensor
from .model import Mode, Model, Weights

if TYPE_CHECKING:
    from mige.diffusion.settings import Sampling
    from mige.inference.pipeline import MIGEPipeline

IMAGES = ("image_1", "image_2", "image_3", "image_4")
PREVIEW_SIDE = 512  # px


class LoadModel:
    """Which model, and how much memory it may take."""

    CATEGORY, FUNCTION = "MIGE", "load"
    RETURN_TYPES, RETURN_NAMES = ("MIGE_MODEL",), ("model",)
    DESCRIPTION = "A model of the folder models/mige. It is loaded when the first image is made."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """What the node takes, as ComfyUI asks."""
        return {
            "required": {
                "name": (sorted(names.models()),),
                "dtype": (["auto", "float32", "bfloat16", "float16"], {"tooltip": "auto: bfloat16 on a GPU"}),
                "t5_bits": (["all", "8", "4"], {"tooltip": "fewer: less memory, the text encoder rounded"}),
                "vae_dtype": (["float32", "bfloat16"],),
                "offload": ("BOOLEAN", {"default": False, "tooltip": "encoders in host memory but while they compute"}),
                "compile": ("BOOLEAN", {"default": False, "tooltip": "faster; the first image waits a little"}),
                "vae_tiling": ("BOOLEAN", {"default": False, "tooltip": "large images in tiles: less memory"}),
            }
        }

    def load(
        self, name: str, dtype: str, t5_bits: str, vae_dtype: str, offload: bool, compile: bool, vae_tiling: bool
    ) -> tuple[Model]:
        """The model; raises ValueError for a name that is not on offer, CheckpointError for a damaged folder."""
        from mige.checkpoints.folder import verify

        folder = names.find("model", name, names.models())
        verify(folder)
        bits = None if t5_bits == "all" else int(t5_bits)
        return (Model(Weights(folder, Mode(dtype, vae_dtype, bits, offload, compile, vae_tiling))),)


class AddAdapter:
    """Low-rank adapters beside those that a model has already."""

    CATEGORY, FUNCTION = "MIGE", "add"
    RETURN_TYPES, RETURN_NAMES = ("MIGE_MODEL",), ("model",)
    DESCRIPTION = "Adapters of the folder models/mige, with a scale; several nodes in a row add several."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node takes, as ComfyUI asks."""
        return {
            "required": {
                "model": ("MIGE_MODEL",),
                "name": (sorted(names.adapters()),),
                "scale": ("FLOAT", {"default": 1.0, "min": -4.0, "max": 4.0, "step": 0.05}),
            }
        }

    def add(self, model: Model, name: str, scale: float) -> tuple[Model]:
        """The model with them; raises ValueError for a name that is not on offer."""
        path = names.find("adapter", name, names.adapters())
        return (Model(model.weights, (*model.adapters, (path, scale))),)


@dataclass(frozen=True)
class Wanted:
    """An instruction with its images, B of them: a batch of ComfyUI's."""

    task: Task
    prompt: str
    references: list[list[Image.Image]]  # of each
    sources: list[Image.Image] | None  # of each; None where nothing is edited
    negative: str


class Instruction:
    """A text with its images."""

    CATEGORY, FUNCTION = "MIGE", "read"
    RETURN_TYPES, RETURN_NAMES = ("MIGE_INSTRUCTION",), ("instruction",)
    DESCRIPTION = (
        "Name the images where they belong: one <imagehere> each, in order, or “image 1”, “image 2”. "
        "An edit of one image needs to name none."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node takes, as ComfyUI asks."""
        return {
            "required": {
                "text": ("STRING", {"multiline": True, "default": ""}),
                "task": (["edit", "generate"], {"tooltip": "edit: image_1 is changed; generate: all are subjects"}),
            },
            "optional": {name: ("IMAGE",) for name in IMAGES}
            | {"negative": ("STRING", {"multiline": True, "default": "", "tooltip": "words alone; may stay empty"})},
        }

    def read(self, text: str, task: str, negative: str = "", **images: Tensor) -> tuple[Wanted]:
        """The instruction with images [B, H, W, C], or [1, H, W, C] for all of a batch.

        Raises ValueError for a text that does not fit its images, batches that do not agree, and what is no image.
        """
        from mige.web.api_prompt import read_prompt

        given = [name for name in IMAGES if images.get(name) is not None]
        if gap := next((name for name, other in zip(given, IMAGES, strict=False) if name != other), None):
            raise ValueError(f"{gap} is there, but the input before it is empty: fill them in order")
        if task == "edit" and not given:
            raise ValueError("nothing to edit: connect image_1, or choose the task “generate”")
        is_one = Task.SUBJECT_EDIT if len(given) > 1 else Task.EDIT
        kind = is_one if task == "edit" else Task.SUBJECT
        reading = read_prompt(kind, text, len(given))
        rows = _rows({name: to_images(name, images[name]) for name in given})
        references = [[row[number - 1] for number in reading.numbers] for row in rows]
        sources = None if kind is Task.SUBJECT else [row[0] for row in rows]
        return (Wanted(kind, reading.prompt, references, sources, negative.strip()),)


def _rows(images: dict[str, list[Image.Image]]) -> list[list[Image.Image]]:
    """The images of each of a batch, from inputs of one image or of all; raises ValueError where they don't agree."""
    count = max((len(batch) for batch in images.values()), default=1)
    if odd := next((name for name, batch in images.items() if len(batch) not in (1, count)), None):
        raise ValueError(f"{odd} has {len(images[odd])} images, another input {count}: give one for all, or as many")
    return [[batch[n % len(batch)] for batch in images.values()] for n in range(count)]


class Sample:
    """Makes the images."""

    CATEGORY, FUNCTION = "MIGE", "sample"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Makes the images that an instruction asks for. Outside a mask the source stays as it is."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """What the node takes, as ComfyUI asks."""
        own = "below 0: the model's own"
        size = "source: as image_1; native: the square it was trained on; an aspect such as 3:2; px such as 768x512"
        return {
            "required": {
                "model": ("MIGE_MODEL",),
                "instruction": ("MIGE_INSTRUCTION",),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1, "control_after_generate": True}),
                "steps": ("INT", {"default": 0, "min": 0, "max": 100, "tooltip": "0: the model's own"}),
                "guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 20.0, "step": 0.1, "tooltip": own}),
                "source_guidance": ("FLOAT", {"default": -1.0, "min": -1.0, "max": 10.0, "step": 0.1, "tooltip": own}),
                "size": ("STRING", {"default": "source", "tooltip": size}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 8, "tooltip": "the seeds after the first"}),
                "previews": ("INT", {"default": 6, "min": 0, "max": 20, "tooltip": "on the way; each is decoded"}),
                "paste_back": ("BOOLEAN", {"default": False, "tooltip": "an edit in its source's own resolution"}),
            },
            "optional": {"mask": ("MASK", {"tooltip": "of image_1: white may change"})},
        }

    def sample(
        self,
        model: Model,
        instruction: Wanted,
        seed: int,
        steps: int,
        guidance: float,
        source_guidance: float,
        size: str,
        batch_size: int,
        previews: int,
        paste_back: bool,
        mask: Tensor | None = None,
    ) -> tuple[Tensor]:
        """Float32 [B batch_size, H, W, 3] in 0..1, the images of an instruction one after the other.

        mask: float [B, H, W], of the sources' size, or [1, H, W] for all. ComfyUI's interruption ends it at the next
        step. Raises ValueError as a call of the pipeline does, before anything runs.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        masks = None if mask is None else to_masks(mask)
        with torch.inference_mode(False), torch.no_grad():  # ComfyUI's inference tensors cannot be compiled or changed
            pipeline, count = model.pipeline(), len(instruction.references)
            own = [value if value >= 0 else None for value in (guidance, source_guidance)]
            how = _settings(pipeline, instruction.task, steps or None, *own)
            made = pipeline(
                [instruction.prompt] * count,
                instruction.references,
                instruction.sources,
                mask=masks[0] if masks and len(masks) == 1 else masks,
                size=size.strip(),
                paste_back=paste_back,
                num_inference_steps=how.steps,
                guidance_scale=how.guidance,
                source_guidance_scale=how.source_guidance,
                negative_prompt=instruction.negative or None,
                num_images_per_prompt=batch_size,
                seed=seed,
                on_step=_watch(pipeline, how.steps, previews),
            ).images
        return (to_tensor(made),)


def _settings(
    pipeline: "MIGEPipeline", task: Task, steps: int | None, guidance: float | None, source_guidance: float | None
) -> "Sampling":
    """Those given, else the model's own, a miniature one's as its bench has them."""
    from mige.data.synthetic.scenes import SIDE
    from mige.diffusion.settings import WORLD, resolve

    usual = WORLD if pipeline.native_size <= SIDE else None
    return resolve(pipeline.scheduler.config, task, steps, guidance, source_guidance, usual)


def _watch(pipeline: "MIGEPipeline", steps: int, previews: int) -> Callable[[int, Tensor, Tensor], None]:
    """What happens after every step: stop if ComfyUI asks for it, else report, now and then with a preview."""
    from mige.utils.images import to_pil

    progress, every = comfy.utils.ProgressBar(steps), -(-steps // previews) if previews else steps

    def on_step(step: int, x: Tensor, x0: Tensor) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        due = (step + 1) % every == 0 and step + 1 < steps
        preview = ("JPEG", to_pil(pipeline.decode(x0[:1]))[0], PREVIEW_SIDE) if due else None
        progress.update_absolute(step + 1, steps, preview)

    return on_step

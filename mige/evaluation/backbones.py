"""The networks whose features are compared: CLIP and SigLIP 2 (transformers), DINO 1 to 3 (timm), each with the
transform that it is published with.

Letters: B images or texts, S side of an image in px, D features.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer, SiglipModel

from mige.utils.images import CLIP_MEAN, CLIP_STD

CLIP = {"ViT-B/32": "openai/clip-vit-base-patch32", "ViT-L/14": "openai/clip-vit-large-patch14"}
SIGLIP = {"SigLIP 2 B/16": "google/siglip2-base-patch16-224"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """RGB image -> what a network takes.

    Attributes:
        resized: px of the shorter side before the centre is cut out; None: the whole image is squeezed to the square.
        size: px of the square. interpolation: of resizing, on 8-bit levels, antialiased.
    """

    resized: int | None
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: InterpolationMode = InterpolationMode.BICUBIC

    @property
    def words(self) -> str:
        """The transform in words, for protocols."""
        how = self.interpolation.value
        if self.resized is None:
            return f"squeezed to {self.size} x {self.size} ({how})"
        return f"shorter side to {self.resized} ({how}), centre crop {self.size}"

    def levels(self, image: Image.Image) -> Tensor:
        """Uint8 [S, S, 3]."""
        if self.resized is None:
            image = F.resize(image, [self.size, self.size], self.interpolation)
        else:
            image = F.center_crop(F.resize(image, self.resized, self.interpolation), self.size)
        return torch.from_numpy(np.array(image))

    def pixels(self, levels_BSSC: Tensor) -> Tensor:
        """Uint8 [B, S, S, 3] -> float32 [B, 3, S, S] on its device, normalised."""
        scaled = levels_BSSC.permute(0, 3, 1, 2).float() / 255
        mean, std = (scaled.new_tensor(c)[:, None, None] for c in (self.mean, self.std))
        return (scaled - mean) / std


def clip_transform(size: int) -> Transform:
    """CLIP's own: shorter side to the size (bicubic), centre."""
    return Transform(size, size, CLIP_MEAN, CLIP_STD)


def dino_transform(size: int = 224) -> Transform:
    """DINO's and DINOv2's: shorter side to 8/7 of the size (256, bicubic), centre, ImageNet's mean and deviation."""
    return Transform(size * 8 // 7, size, IMAGENET_MEAN, IMAGENET_STD)


# timm's names, what differs from their defaults (DINOv2's positions are resampled to 224 px), each release's transform.
DINO: dict[str, tuple[str, dict[str, int], Transform]] = {
    "DINO ViT-S/16": ("vit_small_patch16_224.dino", {}, dino_transform()),
    "DINOv2 ViT-B/14": ("vit_base_patch14_dinov2.lvd142m", {"img_size": 224}, dino_transform()),
    "DINOv3 ViT-B/16": (
        "vit_base_patch16_dinov3.lvd1689m", {},
        Transform(None, 256, IMAGENET_MEAN, IMAGENET_STD, InterpolationMode.BILINEAR),
    ),
}  # fmt: skip


class Backbone(Protocol):
    """What scoring needs of a network."""

    name: str
    fingerprint: str
    transform: Transform

    def encode(self, levels_BSSC: Tensor) -> Tensor:
        """Uint8 [B, S, S, 3] of `transform.levels` -> features, float32 [B, D] on the CPU, not normalised."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> features, float32 [B, D] on the CPU, not normalised. Only of networks that read texts."""


class Clip:
    """CLIP's two towers (Radford et al. 2021) in float32 on a device.

    Args:
        name: "ViT-B/32" or "ViT-L/14". weights: folder or hub name of them; by default OpenAI's on the hub.
    """

    def __init__(self, name: str, weights: str | None = None, device: str = "cpu"):
        weights = weights or CLIP[name]
        self.name, self.device = f"CLIP {name}", device
        self.model = CLIPModel.from_pretrained(weights, dtype=torch.float32).eval().to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(weights)
        self.length = self.model.config.text_config.max_position_embeddings
        self.transform = clip_transform(self.model.config.vision_config.image_size)
        self.fingerprint = fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, levels_BSSC: Tensor) -> Tensor:
        """Uint8 [B, S, S, 3] -> features, float32 [B, D] on the CPU, not normalised."""
        pixels = self.transform.pixels(levels_BSSC.to(self.device))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> features, float32 [B, D] on the CPU, not normalised; what is past 77 tokens is cut."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.device)
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output).cpu()


class Siglip:
    """SigLIP 2's two towers (Tschannen et al. 2025), images squeezed to the square, texts in lower case of 64 tokens.

    Args:
        name: "SigLIP 2 B/16". weights: folder or hub name of them; by default Google's on the hub.
    """

    def __init__(self, name: str, weights: str | None = None, device: str = "cpu"):
        weights = weights or SIGLIP[name]
        self.name, self.device = name, device
        self.model = SiglipModel.from_pretrained(weights, dtype=torch.float32).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(weights)
        self.length = self.model.config.text_config.max_position_embeddings
        half = (0.5, 0.5, 0.5)
        size = self.model.config.vision_config.image_size
        self.transform = Transform(None, size, half, half, InterpolationMode.BILINEAR)
        self.fingerprint = fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, levels_BSSC: Tensor) -> Tensor:
        """Uint8 [B, S, S, 3] -> features, float32 [B, D] on the CPU, not normalised."""
        pixels = self.transform.pixels(levels_BSSC.to(self.device))
        return self.model.vision_model(pixel_values=pixels).pooler_output.cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> features, float32 [B, D] on the CPU, not normalised; padded or cut to 64 tokens, as trained."""
        lower = [text.lower() for text in texts]
        tokens = self.tokenizer(
            lower, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.model.text_model(input_ids=tokens.to(self.device)).pooler_output.cpu()


class Dino:
    """DINO (Caron et al. 2021), DINOv2 (2023) or DINOv3 (2025): the class token after the last norm, in float32.

    Args:
        name: a name of DINO. weights: a file of them (.safetensors, or a release's .pth); by default timm's on the hub.
    """

    def __init__(self, name: str, weights: str | None = None, device: str = "cpu"):
        source = {"file": str(weights)} if weights else {}
        timm_name, options, self.transform = DINO[name]
        options = {"num_classes": 0, "global_pool": "token", **options}
        model = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=source, **options)
        self.name, self.device = name, device
        self.model = model.eval().to(device)
        self.fingerprint = fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, levels_BSSC: Tensor) -> Tensor:
        """Uint8 [B, S, S, 3] -> features, float32 [B, D] on the CPU, not normalised."""
        return self.model(self.transform.pixels(levels_BSSC.to(self.device))).cpu()


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that stand for all weights: two people with the same ones get the same features."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def require_file(path: str | None, option: str) -> None:
    """Raise FileNotFoundError for a path of weights that looks local and is not there, before anything loads."""
    if path and (path.startswith((".", "/")) or Path(path).suffix) and not Path(path).exists():
        raise FileNotFoundError(f"{option} {path}: no such file or folder; leave it out to take the hub's weights")

"""The networks whose features are compared: CLIP (transformers) and DINO (timm), each with its own published transform.

Letters: B images or texts, D features.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers import CLIPModel, CLIPTokenizer

from mige.utils.images import CLIP_MEAN, CLIP_STD

CLIP = {"ViT-B/32": "openai/clip-vit-base-patch32", "ViT-L/14": "openai/clip-vit-large-patch14"}
DINO = {"ViT-S/16": "vit_small_patch16_224.dino"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def clip_transform(size: int) -> transforms.Compose:
    """RGB image -> float32 [3, size, size]: CLIP's own transform (shorter side bicubic, centre)."""
    return _transform(size, size, CLIP_MEAN, CLIP_STD)


def dino_transform(size: int = 224) -> transforms.Compose:
    """RGB image -> float32 [3, size, size]: shorter side to 8/7 of it (256), centre, ImageNet's mean and std."""
    return _transform(size * 8 // 7, size, IMAGENET_MEAN, IMAGENET_STD)


def _transform(resized: int, size: int, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.Resize(resized, InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


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
    def encode(self, pixels: Tensor) -> Tensor:
        """Transformed images [B, 3, S, S] -> features, float32 [B, D] on the CPU, not normalised."""
        pooled = self.model.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return self.model.visual_projection(pooled).cpu()

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts -> features, float32 [B, D] on the CPU, not normalised; what is past 77 tokens is cut."""
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.device)
        return self.model.text_projection(self.model.text_model(**tokens).pooler_output).cpu()


class Dino:
    """DINO's vision transformer (Caron et al. 2021): the class token after the last norm, in float32 on a device.

    Args:
        name: "ViT-S/16". weights: a file of them (.safetensors, or the release's .pth); by default timm's on the hub.
    """

    def __init__(self, name: str, weights: str | None = None, device: str = "cpu"):
        source = {"file": str(weights)} if weights else {}
        model = timm.create_model(DINO[name], pretrained=True, pretrained_cfg_overlay=source, num_classes=0)
        self.name, self.device = f"DINO {name}", device
        self.model = model.eval().to(device)
        self.transform = dino_transform()
        self.fingerprint = fingerprint(self.model)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Transformed images [B, 3, 224, 224] -> features, float32 [B, 384] on the CPU, not normalised."""
        return self.model(pixels.to(self.device)).cpu()


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

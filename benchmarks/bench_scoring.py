"""Speed of scoring: images/s through each backbone at full size, from files and from pixels in memory.

    python benchmarks/bench_scoring.py                      # random weights, images drawn by the script
    python benchmarks/bench_scoring.py --images 2000 --batch 128

In float32.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from harness import Machine, Report, parser
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from mige.evaluation import backbones
from mige.evaluation.scoring import Features

# The towers' sizes as released: width, depth, heads, patch, projection.
VISION = {"ViT-B/32": (768, 12, 12, 32, 512), "ViT-L/14": (1024, 24, 16, 14, 768)}


def random_clip(name: str, device: str) -> backbones.Clip:
    """CLIP of this size with random weights, without a tokenizer: the captions of a benchmark cost next to nothing."""
    width, depth, heads, patch, projection = VISION[name]
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
    vision |= {"num_attention_heads": heads, "patch_size": patch, "image_size": 224}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}  # is not run
    text |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    clip = backbones.Clip.__new__(backbones.Clip)
    clip.name, clip.device, clip.fingerprint = f"CLIP {name}", device, "random"
    clip.model = (
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)).eval().to(device)
    )
    clip.transform = backbones.clip_transform(224)
    return clip


def random_dino(device: str) -> backbones.Dino:
    dino = backbones.Dino.__new__(backbones.Dino)
    dino.name, dino.device, dino.fingerprint = "DINO ViT-S/16", device, "random"
    dino.model = timm.create_model(backbones.DINO["ViT-S/16"], num_classes=0).eval().to(device)
    dino.transform = backbones.dino_transform()
    return dino


def draw_images(folder: Path, many: int) -> list[Path]:
    """Smooth noise of 512 x 512 px."""
    paths = [folder / f"{n}.png" for n in range(many)]
    for n, path in enumerate(paths):
        noise = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC).save(path, compress_level=1)
    return paths


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=512, help="of 512 x 512 px (%(default)s)")
    made.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output, batch=args.batch)
    networks = [random_clip(size, args.device) for size in VISION] + [random_dino(args.device)]
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_images(Path(folder), args.images)
        for network in networks:
            pixels = torch.randn(args.batch, 3, 224, 224)
            alone = machine.median_seconds(lambda: network.encode(pixels), repeats=5)  # noqa: B023
            features = Features(network, Path(folder) / "cache", args.batch)
            from_files = machine.seconds(lambda: features.compute(paths))  # noqa: B023
            report.add({"backbone": network.name, "from_files_per_s": round(args.images / from_files, 1),
                        "network_per_s": round(args.batch / alone, 1)})  # fmt: skip


if __name__ == "__main__":
    main()

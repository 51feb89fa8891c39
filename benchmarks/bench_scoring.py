"""Speed of scoring: images/s through each backbone at full size, and through all at once, from files and from memory.

    python benchmarks/bench_scoring.py                      # random weights, images drawn by the script
    python benchmarks/bench_scoring.py --images 2000 --batch 128 --backbones "CLIP ViT-B/32" "DINO ViT-S/16"

In float32. "opened": what processes on all cores decode and resize for these backbones, without a network: the limit.
"""

import argparse
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from harness import Machine, Report, parser
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPModel

from mige.evaluation import backbones
from mige.evaluation.features import Features, _Images, _together, compute_images
from mige.evaluation.views import View

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
    """DINO's ViT-S/16 with random weights."""
    dino = backbones.Dino.__new__(backbones.Dino)
    dino.name, dino.device, dino.fingerprint = "DINO ViT-S/16", device, "random"
    dino.model = timm.create_model(backbones.DINO[dino.name][0], num_classes=0).eval().to(device)
    dino.transform = backbones.dino_transform()
    return dino


def draw_images(folder: Path, many: int, suffix: str) -> list[Path]:
    """Smooth noise of 512 x 512 px."""
    paths = [folder / f"{n}.{suffix}" for n in range(many)]
    how = {"compress_level": 1} if suffix == "png" else {"quality": 90}

    def draw(n: int) -> None:
        noise = np.random.default_rng(n).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC).save(paths[n], **how)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(many)))
    return paths


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    names = ["CLIP ViT-B/32", "CLIP ViT-L/14", "DINO ViT-S/16"]
    made.add_argument("--images", type=int, default=512, help="of 512 x 512 px (%(default)s)")
    made.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    made.add_argument("--backbones", nargs="+", choices=names, default=names, help="(all)")
    made.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the files (%(default)s)")
    return made.parse_args(argv)


def measure(machine: Machine, report: Report, args: argparse.Namespace, networks: Sequence, views: list[View]) -> None:
    """A line for backbones that share the opened images: from files, opening alone, networks alone."""
    levels = [torch.randint(0, 256, (args.batch, 224, 224, 3), dtype=torch.uint8) for _ in networks]
    alone = machine.median_seconds(
        lambda: [network.encode(one) for network, one in zip(networks, levels, strict=True)], repeats=5
    )
    images = _Images([(view, range(len(networks))) for view in views], [network.transform for network in networks])
    loader = DataLoader(images, 16, num_workers=min(os.cpu_count(), len(views) // 2), collate_fn=_together)
    opened = machine.seconds(lambda: deque(loader, maxlen=0))
    with tempfile.TemporaryDirectory() as cache:
        stores = [Features(network, Path(cache) / str(n)) for n, network in enumerate(networks)]
        from_files = machine.seconds(lambda: compute_images({store: views for store in stores}, args.batch))
    report.add({"backbone": " and ".join(network.name for network in networks), "format": args.format,
                "from_files_per_s": round(len(views) / from_files, 1), "opened_per_s": round(len(views) / opened, 1),
                "network_per_s": round(args.batch / alone, 1)})  # fmt: skip


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output, batch=args.batch)
    made = {"CLIP ViT-B/32": lambda: random_clip("ViT-B/32", args.device),
            "CLIP ViT-L/14": lambda: random_clip("ViT-L/14", args.device),
            "DINO ViT-S/16": lambda: random_dino(args.device)}  # fmt: skip
    networks = [made[name]() for name in args.backbones]
    with tempfile.TemporaryDirectory() as folder:
        views = [View(path) for path in draw_images(Path(folder), args.images, args.format)]
        for some in [[network] for network in networks] + ([networks] if len(networks) > 1 else []):
            measure(machine, report, args, some, views)


if __name__ == "__main__":
    main()

"""Speed of scoring: pictures/s through each backbone at full size, from files and from pixels in memory.

python benchmarks/bench_scoring.py                      # random weights, pictures drawn by the script
python benchmarks/bench_scoring.py --pictures 2000 --batch 128
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
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
    clip = backbones.Clip.__new__(backbones.Clip)
    clip.name, clip.device, clip.fingerprint = f"CLIP {name}", device, "random"
    clip.model = CLIPModel(CLIPConfig(vision_config=vision, projection_dim=projection)).eval().to(device)
    clip.transform = backbones.clip_transform(224)
    return clip


def random_dino(device: str) -> backbones.Dino:
    dino = backbones.Dino.__new__(backbones.Dino)
    dino.name, dino.device, dino.fingerprint = "DINO ViT-S/16", device, "random"
    dino.model = timm.create_model(backbones.DINO["ViT-S/16"], num_classes=0).eval().to(device)
    dino.transform = backbones.dino_transform()
    return dino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512, help="of 512 x 512 px (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}, batch {args.batch}, float32")
    networks = [random_clip(size, args.device) for size in VISION] + [random_dino(args.device)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{n}.png" for n in range(args.pictures)]
        for n, path in enumerate(paths):
            noise = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC).save(path, compress_level=1)
        for network in networks:
            pixels = torch.randn(args.batch, 3, 224, 224)
            network.encode(pixels)
            started = time.perf_counter()
            for _ in range(5):
                network.encode(pixels)  # ends with a copy to the CPU, which waits for the device
            in_memory = 5 * args.batch / (time.perf_counter() - started)
            features = Features(network, Path(folder) / "cache", args.batch)
            started = time.perf_counter()
            features.compute(paths)
            from_files = args.pictures / (time.perf_counter() - started)
            row = {
                "backbone": network.name,
                "from_files_per_s": round(from_files, 1),
                "network_per_s": round(in_memory, 1),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

"""Speed of feature extraction: images/s from JPEG files into the store, and through the VAE alone.

    python benchmarks/bench_extraction.py                                             # one GPU; needs no weights
    python benchmarks/bench_extraction.py --config configs/tiny.py --images 32      # tries it on a CPU

The VAE has the released size and random weights, in float32 as `tools/extract_features.py` runs it. The images are
the example photographs at 768 px, each a file of its own.
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import ROOT, Machine, Report, parser
from PIL import Image

from mige import config
from mige.data.latent_store.extraction import extract
from mige.data.latent_store.store import create_store
from mige.models.build import build_parts
from mige.models.vae import encode

CHUNK = 8  # images that extraction gives to the VAE at once


def write_images(folder: Path, many: int) -> list[Path]:
    """Photographs of 768 px on the shorter side, in turn."""
    photos = []
    for path in sorted((ROOT / "example_data" / "images").glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        scale = 768 / min(photo.size)
        photos.append(photo.resize((round(photo.width * scale), round(photo.height * scale))))
    paths = [folder / f"{number:06d}.jpg" for number in range(many)]
    for path, photo in zip(paths, itertools.cycle(photos), strict=False):
        photo.save(path, quality=90)
    return paths


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    made.add_argument("--images", type=int, default=1000)
    made.add_argument("--batch", type=int, default=32, help="images at a time (%(default)s)")
    made.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 2) - 2), help="(%(default)s)")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    torch.manual_seed(0)
    sizes = config.load(args.config)
    vae = build_parts(sizes.model, device=args.device, only=("vae",))["vae"]
    side = sizes.data.size
    pixels = torch.rand(CHUNK, 3, side, side, device=args.device) * 2 - 1
    alone = CHUNK / machine.median_seconds(lambda: encode(vae, pixels), repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        images = {path: "benchmark" for path in write_images(Path(folder), args.images)}
        store = create_store(Path(folder) / "store", vae=vae, size=side, root=Path(folder))
        failed = []
        seconds = machine.seconds(
            lambda: failed.extend(extract(store, vae, images, batch_size=args.batch, workers=args.workers))
        )
    assert not failed, failed
    report = Report(machine, args.output, workers=args.workers, side=side)
    report.add({"vae_alone_per_s": round(alone, 1), "from_files_per_s": round(args.images / seconds, 1)})


if __name__ == "__main__":
    main()

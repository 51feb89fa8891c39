"""Speed of feature extraction: pictures/s from JPEG files into the store, and through the VAE alone.

    python benchmarks/bench_extraction.py                                             # one GPU; needs no weights
    python benchmarks/bench_extraction.py --config configs/tiny.py --pictures 32      # tries it on a CPU

The VAE has the released size and random weights, in float32 as `tools/extract_features.py` runs it. The pictures are
the example photographs at 768 px, each a file of its own.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from mige import config
from mige.data.latent_store.extraction import extract
from mige.data.latent_store.store import create_store
from mige.models.build import build_parts
from mige.models.vae import encode

ROOT = Path(__file__).parent.parent


def write_pictures(folder: Path, many: int) -> list[Path]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time (%(default)s)")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 2) - 2), help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = config.load(args.config)
    vae = build_parts(sizes.model, device=args.device, only=("vae",))["vae"]
    side = sizes.data.size
    pixels = torch.rand(8, 3, side, side, device=args.device) * 2 - 1  # as many as extraction takes at once
    encode(vae, pixels).mean.cpu()
    started, rounds = time.perf_counter(), 5
    for _ in range(rounds):
        moments = encode(vae, pixels)
    moments.mean.cpu()  # waits for the device
    alone = 8 * rounds / (time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        pictures = {path: "benchmark" for path in write_pictures(Path(folder), args.pictures)}
        store = create_store(Path(folder) / "store", vae=vae, size=side, root=Path(folder))
        started = time.perf_counter()
        failed = extract(store, vae, pictures, batch_size=args.batch, workers=args.workers)
        seconds = time.perf_counter() - started
    assert not failed, failed
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    row = {"device": name, "cpu_cores": os.cpu_count(), "workers": args.workers, "side": side}
    print(json.dumps(row | {"vae_alone_per_s": round(alone, 1), "from_files_per_s": round(args.pictures / seconds, 1)}))


if __name__ == "__main__":
    main()

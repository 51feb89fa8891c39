"""Speed of feature extraction and of each of its parts: images/s of opening, of the VAE, of writing, of all at once.

    python benchmarks/bench_extraction.py                                             # one GPU; needs no weights
    python benchmarks/bench_extraction.py --config configs/tiny.py --images 64        # tries it on a CPU

The VAE has the released size and random weights; with `--trained FOLDER` another one says what precision costs the
moments of trained weights (output/pretrained_models/mini2-vae). The images are the example photographs at 768 px as
JPEG, each a file of its own. PSNR is that of `mige.data.latent_store.encoding.psnr`, against float32 without TF32.
"""

import argparse
import io
import itertools
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from harness import ROOT, Machine, Report, parser
from PIL import Image

from mige import config
from mige.data.crops import as_crops
from mige.data.latent_store.encoding import CHUNK, Encoder, psnr
from mige.data.latent_store.entries import FileFacts, make_entry
from mige.data.latent_store.extraction import distinct_jobs, extract
from mige.data.latent_store.opening import open_chunks
from mige.data.latent_store.part import PartWriter
from mige.data.latent_store.store import FeatureStore, create_store
from mige.models.build import build_parts

VARIANTS = [("float32", False), ("bfloat16", True), ("bfloat16", False), ("float32", True)]
"""Precision of the VAE, and whether it goes through the compiler."""


def write_images(folder: Path, many: int) -> list[Path]:
    """Photographs of 768 px on the shorter side, in turn."""
    photos = []
    for path in sorted((ROOT / "example_data" / "images").glob("*.jpg")):
        photo = Image.open(path).convert("RGB")
        scale = 768 / min(photo.size)
        encoded = io.BytesIO()
        photo.resize((round(photo.width * scale), round(photo.height * scale))).save(encoded, "JPEG", quality=90)
        photos.append(encoded.getvalue())
    paths = [folder / f"{number:06d}.jpg" for number in range(many)]
    for path, photo in zip(paths, itertools.cycle(photos), strict=False):
        path.write_bytes(photo)
    return paths


def measure_opening(machine: Machine, store: FeatureStore, paths: list[Path], workers: int) -> dict:
    """Files -> levels in shared memory, pinned on a GPU, with nothing behind."""
    jobs = distinct_jobs(store, as_crops(paths))
    loader = open_chunks(jobs, store.meta, CHUNK, workers, pinned=machine.on_gpu)
    seconds = machine.seconds(lambda: [len(chunk.images) for chunk in loader])
    return {"images_per_s": round(len(jobs) / seconds, 1)}


def measure_vae(machine: Machine, vae: AutoencoderKL, levels: torch.Tensor, precision: str, compiled: bool) -> dict:
    """Levels on the host -> moments on the host, chunk by chunk as extraction does it, nothing else running."""
    encoder, rounds = Encoder(vae, precision, compiled=compiled), 8 if machine.on_gpu else 1
    first = machine.seconds(lambda: encoder(levels)())
    work = lambda: [arrived() for arrived in [encoder(levels) for _ in range(rounds)]]  # noqa: E731
    rate = rounds * len(levels) / machine.median_seconds(work, repeats=5 if machine.on_gpu else 1)
    return {"first_s": round(first, 1), "images_per_s": round(rate, 1)}


def measure_writing(machine: Machine, store: FeatureStore, path: Path, batch: int, many: int) -> dict:
    """Rows, their checksums and entries to the disk, a flush a batch."""
    rows = np.random.default_rng(0).standard_normal((batch, *store.meta.row), np.float32)
    file = FileFacts.of(path)

    def write() -> None:
        with PartWriter(store.folder, 0) as part:
            for _ in range(-(-many // batch)):
                part.add(np.concatenate([make_entry(bytes(16), file, (1, 1), row) for row in rows]), rows)

    return {"images_per_s": round(-(-many // batch) * batch / machine.seconds(write), 1)}


def measure_all(
    machine: Machine, vae: AutoencoderKL, paths: list[Path], args: argparse.Namespace, case: tuple[str, bool], side: int
) -> dict:
    """Files -> store, as the tool does it. start_s: of the first images, compiler and workers included.

    The rate is that of the images behind the first ones: those are timed a second time, and that time is taken off.
    """
    precision, compiled = case
    folder = paths[0].parent / f"store-{precision}-{compiled}"
    store = create_store(folder, vae=vae, size=side, root=paths[0].parent, precision=precision)

    def extracting(some: list[Path]) -> float:
        options = dict(batch_size=args.batch, workers=args.workers, compiled=compiled)
        issues = []
        spent = machine.seconds(lambda: issues.extend(extract(store, vae, dict.fromkeys(some, "benchmark"), **options)))
        assert not issues, issues
        return spent

    first, second = extracting(paths[:CHUNK]), extracting(paths[CHUNK : 2 * CHUNK])
    rest = paths[2 * CHUNK : None if compiled else max(4 * CHUNK, len(paths) // 4)]
    seconds = extracting(rest) - second
    return {"images": len(rest), "start_s": round(first, 1), "images_per_s": round((len(rest) - CHUNK) / seconds, 1)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    made.add_argument("--images", type=int, default=4096)
    made.add_argument("--batch", type=int, default=32, help="images written at a time (%(default)s)")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    made.add_argument("--trained", type=Path, action="append", default=[], help="a VAE's folder, for its PSNR")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    torch.manual_seed(0)
    sizes = config.load(args.config)
    side = sizes.data.size
    vae = build_parts(sizes.model, device=args.device, only=("vae",))["vae"].eval()
    report = Report(machine, args.output, workers=args.workers, side=side)
    with tempfile.TemporaryDirectory() as name:
        paths = write_images(Path(name), args.images)
        scratch = create_store(Path(name) / "scratch", vae=vae, size=side, root=Path(name))
        for workers in (1, args.workers):
            some = paths[: max(CHUNK, min(len(paths), 200 * workers))]
            report.add({"part": "open", "workers": workers} | measure_opening(machine, scratch, some, workers))
        report.add({"part": "write"} | measure_writing(machine, scratch, paths[0], args.batch, args.images // 2))
        [chunk] = open_chunks(distinct_jobs(scratch, as_crops(paths[:CHUNK])), scratch.meta, CHUNK, 0)
        for of, other in [("random", vae), *((str(path), trained(path, machine)) for path in args.trained)]:
            for precision in ("float32", "bfloat16"):
                found = psnr(other, chunk.levels, precision)
                report.add({"part": "psnr", "vae": of, "precision": precision, "db": str(round(found, 1))})
        levels = chunk.levels.pin_memory() if machine.on_gpu else chunk.levels
        for precision, compiled in VARIANTS if machine.on_gpu else VARIANTS[:1]:
            case = {"part": "vae", "precision": precision, "compiled": compiled}
            report.attempt(case, partial(measure_vae, machine, vae, levels, precision, compiled))
        for precision, compiled in (VARIANTS[0], VARIANTS[1]) if machine.on_gpu else VARIANTS[:1]:
            case = {"part": "all", "precision": precision, "compiled": compiled}
            report.attempt(case, partial(measure_all, machine, vae, paths, args, (precision, compiled), side))


def trained(folder: Path, machine: Machine) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder).eval().to(machine.device)


if __name__ == "__main__":
    main()

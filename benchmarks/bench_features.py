"""The store of moments: bytes an image, rates of writing and reading, a large index, what float16 does to the loss.

    python benchmarks/bench_features.py --folder output/bench    # needs no weights; a CPU is enough

Rows are those of 512 px images; the VAE in front of them is a tiny one, so the rate of writing is no VAE's.
"""

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, Machine, Report, parser
from PIL import Image

from mige import config
from mige.data.latent_store.extraction import extract
from mige.data.latent_store.store import ENTRY, FeatureStore, create_store, open_store
from mige.diffusion.gaussian import Diffusion
from mige.models.build import build_parts

CONFIG = ROOT / "configs" / "tiny.py"
CPU = Machine("cpu")
SIZE = 512


def draw_images(folder: Path, count: int) -> list[Path]:
    """Small JPEGs of noise."""
    folder.mkdir(parents=True)
    rng, paths = np.random.default_rng(0), [folder / f"{number:06d}.jpg" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return paths


def forget_pages(store: FeatureStore) -> None:
    """Take the rows out of the page cache, so that the next read comes from the disk."""
    for file in store.folder.glob("*.rows"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_store(folder: Path, vae, paths: list[Path], dtype: str) -> dict:
    """Write a store of these images, then read each once in random order, one at a time and 16 at a time."""
    store = create_store(folder, vae=vae, size=SIZE, root=folder.parent, dtype=dtype)
    written = CPU.seconds(lambda: extract(store, vae, dict.fromkeys(paths, "benchmark")))
    store = open_store(folder, vae=vae, size=SIZE)
    order = [paths[at] for at in np.random.default_rng(1).permutation(len(paths))]
    result = {"dtype": dtype, "images": len(store), "bytes_an_image": round(store.bytes_on_disk / len(store), 1)}
    result["written_a_second"] = round(len(paths) / written, 1)
    for batch in (1, 16):
        chunks = [order[first : first + batch] for first in range(0, len(order), batch)]
        for state in ("cold", "warm"):
            if state == "cold":
                forget_pages(store)
            took = CPU.seconds(lambda chunks=chunks: [store.read(chunk) for chunk in chunks])
            result[f"read_a_second_{state}_batch_{batch}"] = round(len(paths) / took)
    return result


def measure_index(folder: Path, vae, count: int) -> dict:
    """Open a store of `count` entries (random ones, over a sparse file of rows) and look images up."""
    store = create_store(folder, vae=vae, size=SIZE, root=folder.parent)
    (folder / "a.index").write_bytes(np.random.default_rng(0).bytes(count * ENTRY.itemsize))
    with (folder / "a.rows").open("wb") as file:
        file.truncate(count * store.meta.row_bytes)
    before = resident_bytes()
    started = time.perf_counter()
    store = open_store(folder, vae=vae, size=SIZE)
    opened = time.perf_counter() - started
    held = resident_bytes() - before
    paths = [folder / f"{number}.jpg" for number in range(min(count, 100_000))]
    return {"entries": len(store), "seconds_to_open": round(opened, 2), "memory_bytes_an_entry": round(held / count),
            "lookups_a_second": round(len(paths) / CPU.seconds(lambda: store.missing(paths)))}  # fmt: skip


def measure_loss(sizes, images: int = 16) -> dict:
    """Relative change of the hybrid loss from rounding the moments; means of size 5.5, std e^-9 to e^-4."""
    torch.manual_seed(0)
    transformer = build_parts(sizes, only=["transformer"])["transformer"]
    shape = (images, 4, sizes.transformer["sample_size"], sizes.transformer["sample_size"])
    mean, std = 5.5 * torch.randn(shape), torch.empty(shape).uniform_(-9, -4).exp()
    posterior, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(1000, shape[:1])
    context = torch.randn(images, 8, sizes.transformer["caption_channels"])
    diffusion = Diffusion()

    @torch.inference_mode()
    def loss(rounded: torch.dtype) -> torch.Tensor:
        x0 = 0.18215 * (mean.to(rounded).float() + std.to(rounded).float() * posterior)
        x_t = diffusion.add_noise(x0, noise, t)
        seen = torch.cat([x_t, x0], dim=1)
        output = transformer(seen, encoder_hidden_states=context, timestep=t, return_dict=False)[0]
        return diffusion.loss(output, x0, x_t, noise, t).total

    exact = loss(torch.float32)
    return {f"loss_change_{str(dtype)[6:]}": f"{float(((loss(dtype) - exact) / exact).abs().max()):.1e}"
            for dtype in (torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.set_defaults(device="cpu")
    made.add_argument("--folder", type=Path, required=True, help="a new folder, removed at the end")
    made.add_argument("--images", type=int, default=500)
    made.add_argument("--entries", type=int, default=5_000_000, help="of the large index")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    report, sizes = Report(CPU, args.output), config.load(CONFIG).model
    vae = build_parts(sizes, only=["vae"])["vae"]
    paths = draw_images(args.folder / "images", args.images)
    try:
        for dtype in ("float32", "float16"):
            report.add(measure_store(args.folder / dtype, vae, paths, dtype))
        report.add(measure_index(args.folder / "index", vae, args.entries))
        report.add(measure_loss(sizes))
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()

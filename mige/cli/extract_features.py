"""Encode every image of the given records once, into a store of VAE moments that training reads.

    python tools/extract_features.py --model output/pretrained_models/mige --records train.json --output output/features
    accelerate launch --num_processes 8 tools/extract_features.py ...    # the same on 8 GPUs, of one machine or more
    python tools/extract_features.py ... --config configs/mine.py        # in the shapes of the config (data.shapes)

A second run encodes what is missing and what has changed. Images that cannot be used are listed in the store's
failures.jsonl; the others are done and the exit code is 3 (launchers make it 1). See docs/features.md.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command
from mige.cli.choices import STORE_DTYPES, STORE_PRECISIONS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from mige.data.crops import Crop
    from mige.data.latent_store.shaped import Size
    from mige.data.latent_store.store import FeatureStore
    from mige.data.records import Report
    from mige.inference.sizes import SizeGrid

SOME_FAILED = 3


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--records", nargs="+", type=Path, required=True, help=".json or .jsonl files")
    parser.add_argument("--root", type=Path, help="what paths in the records are relative to (default: their file)")
    parser.add_argument("--model", required=True, help="checkpoint folder, or a name on the hub; its VAE is used")
    parser.add_argument("--output", type=command.folder_to_write, required=True, help="the store")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
    parser.add_argument("--config", type=Path, help="of the training whose data.size and data.shapes are wanted")
    parser.add_argument("--dtype", choices=STORE_DTYPES, default="float32", help="stored (default: %(default)s)")
    parser.add_argument("--precision", choices=STORE_PRECISIONS, default="auto",
                        help="of the VAE (default: on a GPU bfloat16, if its first moments are as good)")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the VAE (default: on a GPU)")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes opening images, for each GPU (default: all cores)")
    parser.add_argument("--device", help="default: a GPU for each process where there are any")
    args = parser.parse_args(argv)
    if (args.size is not None and args.size < 1) or args.batch_size < 1 or (args.workers or 0) < 0:
        parser.error(f"--size is {args.size}, --batch-size {args.batch_size}, --workers {args.workers}; "
                     "expected >= 1, >= 1 and >= 0")  # fmt: skip
    if args.size is not None and args.config is not None:
        parser.error("--size and --config both say how large images are: give one of them")
    return args


def load_vae(model: Path) -> "tuple[AutoencoderKL, SizeGrid]":
    """The checkpoint's VAE in float32, and the sizes of images that the model knows."""
    from diffusers import AutoencoderKL

    from mige.checkpoints import folder as checkpoint
    from mige.inference.sizes import SizeGrid

    checkpoint.verify(model)
    return AutoencoderKL.from_pretrained(model / "vae").float().eval(), SizeGrid.of_folder(model)


def wanted_sizes(args: argparse.Namespace, grid: "SizeGrid") -> "tuple[Size, ...]":
    """Heights and widths, px, that images are to be cropped to."""
    from mige import config
    from mige.data.shapes import image_sizes

    if args.config is not None:
        return image_sizes(config.load(args.config).data, grid.step)
    return ((args.size or grid.native, args.size or grid.native),)


def precision_of(
    vae: "AutoencoderKL", crops: Mapping["Size", "dict[Crop, str]"], folders: Mapping["Size", Path]
) -> str:
    """The precision of the stores in the folders, or for new ones what `choose_precision` says, which is printed."""
    from mige.data.latent_store.encoding import ENOUGH_DB
    from mige.data.latent_store.extraction import choose_precision
    from mige.data.latent_store.meta import make_meta, read_meta

    for folder in folders.values():
        if (folder / "meta.json").is_file():
            return read_meta(folder).precision
    size = next((size for size in crops if crops[size]), next(iter(crops)))
    precision, decibels = choose_precision(vae, crops[size], make_meta(vae, size))
    if decibels is not None:
        print(f"the VAE encodes in {precision}: in bfloat16 the first moments have {decibels:.1f} dB "
              f"({ENOUGH_DB:.0f} are enough); --precision decides otherwise")  # fmt: skip
    return precision


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, gather_object

    from mige.data.latent_store import extraction
    from mige.data.latent_store.shaped import crops_of_shapes, store_folders
    from mige.data.latent_store.store import create_store
    from mige.data.parsing import read_records
    from mige.data.records import Report
    from mige.inference.pipeline import MIGEPipeline

    if args.device is not None:
        command.check_device(command.parser(None), args.device)
    # Shares may end hours apart, and all wait for the last one.
    on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    records = read_records(args.records, root=args.root).raise_if_errors()
    vae, grid = load_vae(MIGEPipeline.locate(args.model))
    crops, unusable = crops_of_shapes(records, wanted_sizes(args, grid))
    folders, device = store_folders(args.output, list(crops)), torch.device(args.device or state.device)
    vae.to(device)
    precision = args.precision
    if precision == "auto":
        chosen = precision_of(vae, crops, folders) if state.is_main_process else None
        [precision] = broadcast_object_list([chosen])
    root = args.root or Path(os.path.commonpath([file.absolute().parent for file in args.records]))
    settings = dict(vae=vae, root=root, dtype=args.dtype, precision=precision)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    issues = []
    for size, folder in folders.items():
        issues += extraction.extract(
            create_store(folder, size=size, **settings),
            vae,
            crops[size],
            process=state.process_index,
            processes=state.num_processes,
            wait=state.wait_for_everyone,
            batch_size=args.batch_size,
            workers=max(1, cores) if args.workers is None else args.workers,
            compiled=device.type == "cuda" if args.compile is None else args.compile,
            progress=state.is_main_process,
        )
    issues = unusable + gather_object(issues)
    if state.is_main_process:
        for size, folder in folders.items():
            count(create_store(folder, size=size, **settings), crops[size])
        report(Report(issues=issues), args.output)
    state.wait_for_everyone()  # a launcher stops all processes when one ends with a failure
    return SOME_FAILED if issues and state.is_main_process else 0


def count(store: "FeatureStore", crops: "dict[Crop, str]") -> None:
    """Print what is in the store."""
    there = len(crops) - len(store.missing(crops))
    print(f"{store.folder}: {there:,} of {len(crops):,} images, {len(store):,} in all, "
          f"{store.bytes_on_disk / max(1, len(store)):,.0f} bytes an image")  # fmt: skip


def report(failures: "Report", folder: Path) -> None:
    """Write the failures to the folder and, the first of them, to stderr."""
    from mige.inference.run import write_failures

    path = write_failures(failures, folder)
    if failures.issues:
        print(f"{len(failures.issues)} could not be used, listed in {path}", file=sys.stderr)
        print("\n".join(map(str, failures.issues[:20])), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError)

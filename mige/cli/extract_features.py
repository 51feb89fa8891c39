"""Encode every image of the given records once, into a store of VAE moments that training reads.

    python tools/extract_features.py --model output/pretrained_models/mige --records train.json --output output/features
    accelerate launch --num_processes 8 tools/extract_features.py ...    # the same on 8 GPUs, of one machine or more

A second run encodes what is missing and what has changed. Images that cannot be used are listed in the store's
failures.jsonl; the others are done and the exit code is 3 (launchers make it 1). See docs/features.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command
from mige.cli.choices import STORE_DTYPES, STORE_PRECISIONS

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from mige.data.crops import Crop
    from mige.data.latent_store.store import FeatureStore
    from mige.data.records import Report

SOME_FAILED = 3


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--records", nargs="+", type=Path, required=True, help=".json or .jsonl files")
    parser.add_argument("--root", type=Path, help="what paths in the records are relative to (default: their file)")
    parser.add_argument("--model", required=True, help="checkpoint folder, or a name on the hub; its VAE is used")
    parser.add_argument("--output", type=command.folder_to_write, required=True, help="the store")
    parser.add_argument("--size", type=int, help="side in pixels (default: the model's)")
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
    return args


def load_vae(model: Path) -> "tuple[AutoencoderKL, int]":
    """The checkpoint's VAE in float32, and the side of the images the model was trained on."""
    from diffusers import AutoencoderKL

    from mige.checkpoints import folder as checkpoint
    from mige.inference.sizes import SizeGrid

    checkpoint.verify(model)
    return AutoencoderKL.from_pretrained(model / "vae").float().eval(), SizeGrid.of_folder(model).native


def precision_of(vae: "AutoencoderKL", crops: "dict[Crop, str]", folder: Path, size: int) -> str:
    """The precision of the store in the folder, or for a new one what `choose_precision` says, which is printed."""
    from mige.data.latent_store.encoding import ENOUGH_DB
    from mige.data.latent_store.extraction import choose_precision
    from mige.data.latent_store.meta import make_meta, read_meta

    if (folder / "meta.json").is_file():
        return read_meta(folder).precision
    precision, decibels = choose_precision(vae, crops, make_meta(vae, size))
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
    from mige.data.latent_store import store as features
    from mige.data.parsing import read_records
    from mige.data.records import Report
    from mige.inference.pipeline import MIGEPipeline

    if args.device is not None:
        command.check_device(command.parser(None), args.device)
    # Shares may end hours apart, and all wait for the last one.
    on_cpu = args.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    crops = extraction.distinct_crops(read_records(args.records, root=args.root).raise_if_errors())
    vae, native = load_vae(MIGEPipeline.locate(args.model))
    root = args.root or Path(os.path.commonpath([file.absolute().parent for file in args.records]))
    size, device = args.size or native, torch.device(args.device or state.device)
    vae.to(device)
    precision = args.precision
    if precision == "auto":
        chosen = precision_of(vae, crops, args.output, size) if state.is_main_process else None
        [precision] = broadcast_object_list([chosen])
    settings = dict(vae=vae, size=size, root=root, dtype=args.dtype, precision=precision)
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    issues = extraction.extract(
        features.create_store(args.output, **settings),
        vae,
        crops,
        process=state.process_index,
        processes=state.num_processes,
        wait=state.wait_for_everyone,
        batch_size=args.batch_size,
        workers=max(1, cores) if args.workers is None else args.workers,
        compiled=device.type == "cuda" if args.compile is None else args.compile,
        progress=state.is_main_process,
    )
    issues = gather_object(issues)
    if state.is_main_process:
        report(features.create_store(args.output, **settings), crops, Report(issues=issues), args.output)
    state.wait_for_everyone()  # a launcher stops all processes when one ends with a failure
    return SOME_FAILED if issues and state.is_main_process else 0


def report(store: "FeatureStore", crops: "dict[Crop, str]", failures: "Report", folder: Path) -> None:
    """Print what is in the store; failures go to its folder and, the first of them, to stderr."""
    from mige.inference.run import write_failures

    there = len(crops) - len(store.missing(crops))
    print(f"{folder}: {there:,} of {len(crops):,} images, {len(store):,} in all, "
          f"{store.bytes_on_disk / max(1, len(store)):,.0f} bytes an image")  # fmt: skip
    path = write_failures(failures, folder)
    if failures.issues:
        print(f"{len(failures.issues)} could not be used, listed in {path}", file=sys.stderr)
        print("\n".join(map(str, failures.issues[:20])), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError)

"""Convert official weight files into a checkpoint folder, accounting for every key.

    # the released weights
    python tools/convert_checkpoint.py release --model model.pth --vae sd-vae-ft-ema --t5 t5-v1_1-xxl \\
        --output output/pretrained_models/mige
    # the files that training starts from
    python tools/convert_checkpoint.py training --pixart PixArt-XL-2-512x512.pth --eva eva_vit_g.pth \\
        --blip2 blip2_pretrained_flant5xxl.pth --vae sd-vae-ft-ema --t5 t5-v1_1-xxl \\
        --output output/pretrained_models/start

Prints a line a key (official name -> ours); a file with a key missing, unexpected or of another shape is refused.
--t5 needs only the tokenizer for `release`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command
from mige.cli.places import CONFIGS

if TYPE_CHECKING:
    from mige.config import Config


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    release = kinds.add_parser("release", help="the released model.pth")
    release.add_argument("--model", type=Path, required=True, help="model.pth")
    training = kinds.add_parser("training", help="the files training starts from")
    for name in ("pixart", "eva", "blip2"):
        training.add_argument(f"--{name}", type=Path, required=True)
    training.add_argument("--seed", type=int, default=0, help="of what starts fresh: feature fusion, null context")
    for kind in (release, training):
        kind.add_argument("--vae", type=Path, required=True, help="folder in diffusers' layout")
        kind.add_argument("--t5", type=Path, required=True, help="folder of t5-v1_1-xxl")
        kind.add_argument("--output", type=command.folder_to_write, required=True, help="checkpoint folder to make")
        kind.add_argument("--config", type=Path, default=CONFIGS / "mige_512.py", help="sizes (default: %(default)s)")
        kind.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as in the files")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from safetensors import SafetensorError

    from mige import config
    from mige.utils.files import atomic_directory

    command.quiet_libraries()
    sizes = config.load(args.config)
    try:
        with atomic_directory(args.output) as folder:
            report = write(args, sizes, folder)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(f"{args.output}: cannot be written: {error}") from error
    print(f"{args.output}: {len(report)} keys accounted for")


def write(args: argparse.Namespace, sizes: "Config", folder: Path) -> list[str]:
    """Convert into `folder`, check it, and give back the report."""
    import torch

    from mige.checkpoints import convert
    from mige.checkpoints.folder import verify
    from mige.diffusion.solver import DPMSolver2M
    from mige.inference.pipeline import MIGEPipeline

    tokenizer = convert.load_tokenizer(args.t5, sizes.model.text_encoder["vocab_size"])
    if args.kind == "release":
        parts, report = convert.from_release(sizes, args.model, args.vae)
    else:
        parts, report = convert.from_training_files(
            sizes, pixart=args.pixart, eva=args.eva, blip2=args.blip2, t5_dir=args.t5, vae_dir=args.vae, seed=args.seed
        )
    print("\n".join(report))
    if args.dtype:
        for name in parts.keys() - {"vae"}:
            parts[name].to(getattr(torch, args.dtype))
    stored = parts["image_encoder"].state_dict()
    pipeline = MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M())
    parts["image_encoder"].load_state_dict(stored, assign=True)  # the pipeline has made some of it float32, to run
    pipeline.save_pretrained(folder, max_shard_size="2GB")
    verify(folder)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted=command.STARTS_ANEW)

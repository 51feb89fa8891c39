"""Convert official weight files into a checkpoint folder, accounting for every key.

    # the released weights
    python tools/convert_checkpoint.py release --model model.pth --vae sd-vae-ft-ema --t5 t5-v1_1-xxl \\
        --output output/pretrained_models/mige
    # the files that training starts from
    python tools/convert_checkpoint.py training --pixart PixArt-XL-2-512x512.pth --eva eva_vit_g.pth \\
        --blip2 blip2_pretrained_flant5xxl.pth --vae sd-vae-ft-ema --t5 t5-v1_1-xxl \\
        --output output/pretrained_models/start

Prints a line a key (official name -> ours); a file with a missing, unexpected or misshapen key is refused.
--t5 needs only the tokenizer for `release`.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from mige import config
from mige.checkpoints import convert
from mige.checkpoints.folder import verify
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.utils.files import whole_folder

CONFIG = Path(__file__).parent.parent / "configs" / "mige_512.py"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        kind.add_argument("--output", type=Path, required=True, help="checkpoint folder to make")
        kind.add_argument("--config", type=Path, default=CONFIG, help="sizes (default: %(default)s)")
        kind.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as in the files")
    return parser.parse_args()


def main() -> None:
    args = parse()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    sizes = config.load(args.config)
    with whole_folder(args.output) as folder:
        report = write(args, sizes, folder)
    print(f"{args.output}: {len(report)} keys accounted for")


def write(args: argparse.Namespace, sizes: config.Config, folder: Path) -> list[str]:
    """Convert into `folder`, check it, and give back the report."""
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


if __name__ == "__main__":
    try:
        main()
    except (convert.CheckpointError, config.ConfigError, OSError, SafetensorError) as error:  # the last: disk full
        sys.exit(f"error: {error}")

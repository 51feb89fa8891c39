"""Pretrains MIGE-mini's encoder: reconstruction of its images and layout prediction of the answer.

Before the joint training, which else may teach it names alone.

    python train_scripts/pretrain_mini_encoder.py output/mini/seeing --start output/mini/start --steps 2000

From the context that the DiT will read, a small transformer that is thrown away afterwards reconstructs every image of
the instruction, patch by patch of the vision tower, and every subject that the answer brings or changes, queried by its
place there. Vision tower, Q-Former, fusion and text encoder train; DiT and VAE stay as they are. It prints the
unexplained variance (squared error by variance) of both: of the stream's images and subjects and of unseen ones.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import CONFIGS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config")
    parser.add_argument("--start", type=Path, required=True, help="checkpoint folder whose encoder is taught")
    parser.add_argument("--config", type=Path, default=CONFIGS / "mini.py", help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--batch", type=int, default=256, help="cases a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=2e-3, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=20_000, help="none that a training has (%(default)s)")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_intermixed_args(argv)  # overrides may come before and after the options
    if min(args.steps, args.batch) < 1 or args.seconds <= 0:
        parser.error(f"--steps is {args.steps}, --batch {args.batch}, --seconds {args.seconds}; "
                     "expected >= 1, >= 1 and > 0")  # fmt: skip
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige import config
    from mige.mini.pretraining import teach

    args.device = command.check_device(command.parser(None), args.device)
    settings = config.load(args.config, [f"train.pretrained={str(args.start)!r}", *args.overrides])
    how = ("steps", "seconds", "batch", "rate", "seed", "workers", "device")
    teach(args.start, args.folder, settings, **{name: getattr(args, name) for name in how})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted=command.STARTS_ANEW)

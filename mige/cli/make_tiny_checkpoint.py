"""Write a tiny, seeded, untrained model in the *official* file layout, so that the demo and tests convert real files.

    python tools/make_tiny_checkpoint.py output/tiny_official

makes model.pth (as released), vae/ (diffusers' layout), t5/ (config, weights, spiece.model); sizes of configs/tiny.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import CONFIGS


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    parser.add_argument("--config", type=Path, default=CONFIGS / "tiny.py")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.checkpoints.tiny import write_official

    write_official(args.folder, args.config, args.seed)
    print(f"{args.folder}: tiny, untrained model in the official layout")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted=command.STARTS_ANEW)

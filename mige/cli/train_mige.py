"""Train MIGE from a config file.

    python train_scripts/train_mige.py configs/mige_512.py --output output/runs/mine
    accelerate launch --config_file configs/accelerate/fsdp2.yaml train_scripts/train_mige.py configs/mige_512.py ...

The same command again resumes from the newest checkpoint of the run. SIGTERM saves and exits with code 75. Any value of
the config can be set on the command line: train.steps=200 data.features=output/features
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command, places


def parse(argv: Sequence[str] | None = None, doc: str | None = __doc__) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(doc)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="run folder, made or resumed")
    parser.add_argument("--resume", type=Path, help="a checkpoint folder (default: the newest of the run)")
    args = parser.parse_intermixed_args(argv)  # overrides may come before and after the options
    args.config = places.config(args.config)
    return args


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    from mige.training.signals import exit_when_stopped

    exit_when_stopped()
    from mige import config
    from mige.training.trainer import Trainer

    return Trainer(config.load(args.config, args.overrides), args.output, args.resume).run(args.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))

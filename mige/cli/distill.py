"""Train a few-step student of a MIGE checkpoint: images in 4 steps of one branch, guidance inside.

    python train_scripts/distill.py configs/distill.py --output output/runs/student
    python train_scripts/distill.py configs/distill.py --output output/runs/turbo \\
        train.trainable=lora train.optimizer=adamw train.ema=None train.lora_rank=64

The first makes a whole model (checkpoints/step-.../model), the second adapters for the teacher (checkpoints/step-.../
lora, infer.py --lora); both bring their steps along. train.pretrained is the teacher, distillation.steps the number of
steps. Launched, stopped and resumed like train_mige.py.
"""

import argparse
from collections.abc import Sequence

from mige.cli import command, train_mige


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    return train_mige.parse(argv, __doc__)


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    from mige.training.signals import exit_when_stopped

    exit_when_stopped()
    from mige import config
    from mige.training.distillation import DistillationTrainer

    return DistillationTrainer(config.load(args.config, args.overrides), args.output, args.resume).run(args.resume)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))

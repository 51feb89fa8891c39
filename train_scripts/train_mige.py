"""Train MIGE from a config file.

    python train_scripts/train_mige.py configs/mige_512.py --output output/runs/mine
    accelerate launch --config_file configs/accelerate/fsdp2.yaml train_scripts/train_mige.py configs/mige_512.py ...

The same command again goes on from the newest checkpoint of the run. SIGTERM saves and exits with code 75. Any value of
the config can be set on the command line: train.steps=200 data.features=output/features
"""

import argparse
import sys
from pathlib import Path

from mige import config
from mige.checkpoints.errors import CheckpointError
from mige.data.records import BadRecordsError
from mige.training.errors import TrainingError
from mige.training.signals import exit_when_stopped
from mige.training.trainer import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--output", type=Path, required=True, help="run folder, made or gone on with")
    parser.add_argument("--resume", type=Path, help="a checkpoint folder (default: the newest of the run)")
    args = parser.parse_intermixed_args()  # overrides may stand before and after the options
    exit_when_stopped()
    return Trainer(config.load(args.config, args.overrides), args.output).run(args.resume)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (config.ConfigError, BadRecordsError, CheckpointError, TrainingError) as error:
        sys.exit(f"error: {error}")

"""The ablations of MIGE-mini: train every variant from several seeds, score it, and say what comes out.

    python tools/ablate.py output/ablation --seeds 0 1
    python tools/ablate.py output/ablation --seeds 2 --variants joint edit_only
    python tools/ablate.py output/ablation --report-only

Writes OUT/table.md, report.json and curves.png. The same command goes on where it was stopped; a run that has its
scores in OUT/scores.jsonl is finished, and its weights are deleted. Runs of several machines (the same options and
start, a folder each) are merged by joining their scores.jsonl beside one settings.json, also with the published ones
in docs/ablation/, of which the defaults are the options. Several at a time on one card, a folder each, need
OMP_NUM_THREADS=2. docs/mini.md says what is compared.
"""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

from mige import config
from mige.checkpoints.folder import CheckpointError
from mige.mini import ablation, ablation_report
from mige.mini.bench import BenchError
from mige.training.trainer import PREEMPTED

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make or go on with")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config, for all variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of weights and data (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=ablation.VARIANTS, default=list(ablation.VARIANTS),
                        metavar="VARIANT", help=f"of {', '.join(ablation.VARIANTS)} (all)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of training, a multiple of 4 (the config's)")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "ablation.py", help="(%(default)s)")
    parser.add_argument("--from-model", type=Path, default=ROOT / "output/pretrained_models/ablation-base",
                        help="checkpoint folder that all runs start from (%(default)s)")  # fmt: skip
    parser.add_argument("--per-kind", type=int, default=ablation.Plan.per_kind,
                        help="cases of each kind, even (%(default)s)")  # fmt: skip
    parser.add_argument("--sampler-steps", type=int, default=ablation.Plan.sampler_steps, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=ablation.Plan.batch,
                        help="pictures generated at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--keep-weights", action="store_true", help="keep checkpoints and pictures of scored runs")
    parser.add_argument("--report-only", action="store_true", help="train and score nothing")
    args = parser.parse_intermixed_args()
    if args.batch < 1 or args.sampler_steps < 1 or args.per_kind < 2 or args.per_kind % 2:
        parser.error(f"--batch is {args.batch}, --sampler-steps {args.sampler_steps}, --per-kind {args.per_kind}; "
                     "expected >= 1, >= 1 and an even number >= 2")  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the curves need matplotlib: pip install 'mige[ablation]'")
    return args


def main(args: argparse.Namespace) -> None:
    if not args.report_only:
        steps = [] if args.steps is None else [f"train.steps={args.steps}"]
        plan = ablation.Plan(
            out=args.out,
            file=args.config,
            overrides=(*args.overrides, *steps),
            model=args.from_model,
            trainer=ROOT / "train_scripts" / "train_mige.py",
            per_kind=args.per_kind,
            sampler_steps=args.sampler_steps,
            batch=args.batch,
            keep_weights=args.keep_weights,
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))  # the training saves before it ends
        ablation.run(plan, args.variants, args.seeds)
    table, sentences = ablation_report.write(args.out)
    print("\n".join([*sentences, f"{table}: all of it; beside it report.json and curves.png"]))


if __name__ == "__main__":
    try:
        main(parse())
    except (ablation.AblationError, BenchError, CheckpointError, config.ConfigError, OSError) as error:
        sys.exit(f"error: {error}")

"""The ablations of MIGE-mini: train every variant from several seeds, score it, and say what comes out.

    python tools/ablate.py output/ablation --seeds 0 1
    python tools/ablate.py output/ablation --seeds 2 --variants joint edit_only
    python tools/ablate.py output/ablation --report-only

Writes OUT/table.md, report.json and curves.png. The same command resumes where it was stopped; a run that has its
scores in OUT/scores.jsonl is finished, and its weights are deleted. Runs of several machines (the same options and
start, a folder each) are merged by joining their scores.jsonl beside one settings.json, also with the published ones
in mige/mini/published/, of which the defaults are the options. Several at a time on one card, a folder each, need
OMP_NUM_THREADS=2. docs/mini.md says what is compared.
"""

import argparse
import importlib.util
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.choices import VARIANTS
from mige.cli.places import CONFIGS, MODELS, ROOT


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("out", type=command.folder_to_write, help="folder to make or resume")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config, for all variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of weights and data (%(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS),
                        metavar="VARIANT", help=f"of {', '.join(VARIANTS)} (all)")  # fmt: skip
    parser.add_argument("--steps", type=int, help="of training, a multiple of 4 (the config's)")
    parser.add_argument("--config", type=Path, default=CONFIGS / "ablation.py", help="(%(default)s)")
    parser.add_argument("--from-model", type=Path, default=MODELS / "ablation-base",
                        help="checkpoint folder that all runs start from (%(default)s)")  # fmt: skip
    parser.add_argument("--per-kind", type=int, default=52,
                        help="cases of each kind, even (%(default)s)")  # fmt: skip
    parser.add_argument("--sampler-steps", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64,
                        help="images generated at a time (%(default)s)")  # fmt: skip
    parser.add_argument("--keep-weights", action="store_true", help="keep checkpoints and images of scored runs")
    parser.add_argument("--report-only", action="store_true", help="train and score nothing")
    args = parser.parse_intermixed_args(argv)
    if args.batch < 1 or args.sampler_steps < 1 or args.per_kind < 2 or args.per_kind % 2:
        parser.error(f"--batch is {args.batch}, --sampler-steps {args.sampler_steps}, --per-kind {args.per_kind}; "
                     "expected >= 1, >= 1 and an even number >= 2")  # fmt: skip
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the curves need matplotlib: pip install 'mige[ablation]'")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.mini import ablation, ablation_report
    from mige.training.signals import PREEMPTED

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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))

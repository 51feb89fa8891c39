"""Measure a model on a benchmark.

    python tools/evaluate.py --benchmark mini --model output/mini/model --results output/mini/bench
    python tools/evaluate.py --benchmark mini --model output/mini/model --results output/look --per-kind 4 --steps 12

makes RESULTS/report.html (tables and pictures), scores.json, cases.jsonl (a line a case) and images/. A run that was
stopped goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import torch

from mige.checkpoint import CheckpointError
from mige.pipeline import MIGEPipeline
from mige.world import bench, bench_report, tasks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", choices=["mini"], required=True, help="mini: the miniature world")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--results", type=Path, required=True, help="folder to make or to go on with")
    parser.add_argument("--per-kind", type=int, default=bench.PER_KIND, help="cases of each kind, even (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="cases at a time (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="towards the instruction (%(default)s)")
    parser.add_argument("--source-guidance", type=float, default=1.0, help="towards the edited picture (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=tasks.KINDS, default=list(tasks.KINDS), metavar="KIND",
                        help=f"of task (all): {', '.join(tasks.KINDS)}")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    if args.batch < 1 or args.steps < 1 or args.per_kind < 2 or args.per_kind % 2:
        parser.error(f"--batch is {args.batch}, --steps {args.steps}, --per-kind {args.per_kind}; "
                     "expected >= 1, >= 1 and an even number >= 2")  # fmt: skip
    return args


def main() -> None:
    args = parse()
    chosen = bench.cases(args.per_kind, kinds=args.kinds)
    pipeline = MIGEPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    rows = bench.run(
        pipeline,
        chosen,
        args.results,
        model=args.model,
        batch=args.batch,
        steps=args.steps,
        guidance=args.guidance,
        source_guidance=args.source_guidance,
    )
    page = bench_report.write(chosen, rows, args.results)
    print(bench_report.text_table(rows))
    print(f"{page}: the tables and pictures")


if __name__ == "__main__":
    try:
        main()
    except (bench.BenchError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")

"""A benchmark's own files -> records that infer.py runs, and what evaluate.py compares with.

    python tools/prepare_benchmark.py dreambench --data dreambooth --output output/dreambench/benchmark
    python tools/prepare_benchmark.py emu_edit --output output/emu_edit/benchmark      # streamed from the hub
    python tools/prepare_benchmark.py magicbrush --data test --output output/magicbrush/benchmark
    python tools/prepare_benchmark.py migebench --data MIGEBench --output output/migebench/benchmark
    python tools/prepare_benchmark.py gedit --output output/gedit/benchmark            # streamed from the hub
    python tools/prepare_benchmark.py dreambench_plus --data data --output output/dreambench_plus/benchmark
    python tools/prepare_benchmark.py imgedit --data Benchmark --output output/imgedit/benchmark
    python tools/prepare_benchmark.py omnicontext --output output/omnicontext/benchmark

docs/evaluation.md says where the files are and what each protocol compares.
"""

import argparse
from collections.abc import Sequence

from mige.cli import command
from mige.cli.choices import BENCHMARKS

NOT_ON_THE_HUB = ("dreambench", "magicbrush", "dreambench_plus", "imgedit")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--data", help="folder of its files, or its name on the hub (default: that name)")
    parser.add_argument("--output", type=command.folder_to_write, required=True, help="folder to write")
    parser.add_argument("--root", help="migebench, imgedit: folder of the images (default: the data)")
    parser.add_argument("--split", choices=["validation", "test"], default="validation", help="emu_edit")
    parser.add_argument("--samples", type=int, default=1, help="dreambench: images a prompt (%(default)s)")
    parser.add_argument("--against", choices=["input", "all"], default="input",
                        help="dreambench: compare with the input, or with all images of the subject")  # fmt: skip
    parser.add_argument(
        "--iterative", metavar="RESULTS", help="magicbrush: turns start from the results in this folder"
    )
    args = parser.parse_args(argv)
    if args.data is None and args.benchmark in NOT_ON_THE_HUB:
        parser.error(f"{args.benchmark} is not on the hub; fetch it and give its folder as --data")
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.evaluation.benchmarks.files import Options
    from mige.evaluation.benchmarks.prepared import prepare
    from mige.evaluation.benchmarks.table import BENCHMARKS

    args.data = args.data or BENCHMARKS[args.benchmark].hub
    options = Options(args.data, args.root, args.split, args.samples, args.against, args.iterative)
    for path in prepare(args.benchmark, options, args.output):
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError, interrupted="the same command starts anew")

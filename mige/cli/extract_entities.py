"""Cut the named object out of every result of MIGEBench: Grounding DINO, SAM, black background, crop to the box.

    python tools/extract_entities.py --results output/migebench

writes RESULTS/entities: crops/, entities.jsonl, and index.html with boxes and masks to look at. Resumes where it was
stopped. Then give that folder to tools/evaluate.py as --entities.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.choices import DETECTOR, SEGMENTER


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--results", type=Path, required=True, help="run folder of infer.py")
    parser.add_argument("--prepared", type=Path, help="folder of prepare_benchmark.py (default: RESULTS/benchmark)")
    parser.add_argument("--output", type=command.folder_to_write, help="default: RESULTS/entities")
    parser.add_argument("--detector", default=DETECTOR, help="Grounding DINO: folder or hub name (%(default)s)")
    parser.add_argument("--segmenter", default=SEGMENTER, help="SAM: folder or hub name (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (%(default)s)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.evaluation import entities, outputs
    from mige.evaluation.benchmarks.files import BenchmarkError
    from mige.evaluation.benchmarks.prepared import read

    args.device = command.check_device(command.parser(None), args.device)
    prepared = read(args.prepared or args.results / "benchmark")
    rows = [row for row in prepared.scored if "object" in row["score"]]
    if not rows:
        raise BenchmarkError(f"{prepared.name} names no objects; entities are cut out for migebench")
    images = outputs.outputs(prepared, args.results)
    finder = entities.EntityFinder(args.detector, args.segmenter, args.device)
    out = args.output or args.results / "entities"
    found, every = entities.extract(rows, images, finder, out, args.batch)
    print(f"{found} of {every} objects found ({1 - found / every:.1%} not): {out / 'index.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError)

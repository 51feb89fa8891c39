"""Cut the named object out of every result of MIGEBench: Grounding DINO, SAM, black background, crop to the box.

    python tools/extract_entities.py --results output/migebench

writes RESULTS/entities: crops/, entities.jsonl, and index.html with boxes and masks to look at. Goes on where it was
stopped. Then give that folder to tools/evaluate.py as --entities.
"""

import argparse
import sys
from pathlib import Path

import torch

from mige.evaluation import benchmarks, entities, scoring
from mige.utils.images import BadImageError


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="run folder of infer.py")
    parser.add_argument("--prepared", type=Path, help="folder of prepare_benchmark.py (default: RESULTS/benchmark)")
    parser.add_argument("--output", type=Path, help="default: RESULTS/entities")
    parser.add_argument(
        "--detector", default=entities.DETECTOR, help="Grounding DINO: folder or hub name (%(default)s)"
    )
    parser.add_argument("--segmenter", default=entities.SEGMENTER, help="SAM: folder or hub name (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures at a time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    args = parser.parse_args()
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    return args


def main() -> None:
    args = parse()
    prepared = benchmarks.read(args.prepared or args.results / "benchmark")
    rows = [row for row in prepared.scored if "object" in row["score"]]
    if not rows:
        raise benchmarks.BenchmarkError(f"{prepared.name} names no objects; entities are cut out for migebench")
    pictures = scoring.outputs(prepared, args.results)
    finder = entities.EntityFinder(args.detector, args.segmenter, args.device)
    out = args.output or args.results / "entities"
    found, every = entities.extract(rows, pictures, finder, out, args.batch)
    print(f"{found} of {every} objects found ({1 - found / every:.1%} not): {out / 'index.html'}")


if __name__ == "__main__":
    try:
        main()
    except (benchmarks.BenchmarkError, BadImageError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")

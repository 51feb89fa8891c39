"""Turn a public data set into records and images for training.

    # streamed from the hub
    python tools/prepare_data.py magicbrush --output data/magicbrush
    python tools/prepare_data.py subjects200k --output data/subjects200k --limit 10000
    # from files that were fetched before
    python tools/prepare_data.py instructpix2pix --input downloads/instructpix2pix --output data/instructpix2pix
    python tools/prepare_data.py seed_data_edit --input downloads/SEED-Data-Edit-Part2-3 --output data/seed
    # the authors' subject-driven edits: an index of images that lie elsewhere
    python tools/prepare_data.py mige_sub_edit --input index.json --root /path/to/SA1B=downloads/sa1b --output data/sub
    # any other set: its columns are named by a preset or by a small YAML file of yours
    python tools/prepare_data.py layout --layout omniedit --output data/omniedit --limit 10000

Writes records.jsonl, images/, skipped.jsonl (every skipped sample, with its reason) and summary.json. A killed run
resumes where it stopped; a finished folder is left alone. docs/data.md describes the sources.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.choices import SOURCES


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--output", type=command.folder_to_write, required=True, help="folder to make or resume")
    parser.add_argument("--input", nargs="+", help="local files or folders, or a hub name (default: the source's own)")
    parser.add_argument("--split", help="magicbrush: train or dev (default: the layout's, else train)")
    parser.add_argument("--name", default="", help="how ids begin, if not with the source (two sets of one source)")
    parser.add_argument("--limit", type=_positive, help="rows to read at most, over all runs")
    parser.add_argument("--workers", type=_positive, default=min(8, os.cpu_count() or 1), help="threads (%(default)s)")
    parser.add_argument("--min-quality", type=int, default=5, help="subjects200k: least of its scores (%(default)s)")
    help_ = "mige_sub_edit: how its paths begin, and the folder that holds them here; once for each"
    parser.add_argument("--root", action="append", default=[], metavar="OLD=NEW", help=help_)
    parser.add_argument("--layout", help="layout: a preset (docs/data.md), or a YAML file that names the columns")
    parser.add_argument("--images", type=Path, help="layout: the folder that paths of images are relative to")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}, expected at least 1")
    return number


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.data.prepare.index import parse_roots
    from mige.data.prepare.layout import read_layout
    from mige.data.prepare.run import RECORDS, SKIPPED, prepare
    from mige.data.prepare.sources import SOURCES, Settings

    layout = read_layout(args.layout) if args.layout else None
    hub = layout.hub if layout else SOURCES[args.source].hub
    inputs = args.input or ([hub] if hub else [])
    settings = Settings(
        args.source,
        tuple(str(Path(given).resolve()) if Path(given).exists() else given for given in inputs),
        args.split or (layout.split if layout else "train"),
        args.name,
        args.min_quality,
        parse_roots(args.root),
        layout,
        str(args.images.resolve()) if args.images else "",
    )
    summary = prepare(settings, args.output, limit=args.limit, workers=args.workers)
    print(summary.text())
    print(f"{args.output / RECORDS}: the records; {args.output / SKIPPED}: what was skipped")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))

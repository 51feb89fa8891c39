"""Change an image as an instruction says.

    mige edit photo.jpg "make it snowy"
    mige edit photo.jpg "replace image 1's cup with image 2" --subject flower.jpg --output new.png

The images are named "image 1" (the one to edit), "image 2", ... or by one `<imagehere>` each, in order; an edit without
subjects needs to name none. The PNG holds its settings as text.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command, one_image
from mige.tasks import Task


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("image", type=Path, help="the image to edit")
    parser.add_argument("--mask", type=Path, help="an image of its size, white or transparent where it may change")
    parser.add_argument("--paste-back", action="store_true", help="the result at the image's own resolution")
    return one_image.parse(parser, argv, lambda args: f"{args.image.stem}-edited.png")


def run(args: argparse.Namespace) -> None:
    """What the command does, with the arguments of `parse`."""
    task = Task.SUBJECT_EDIT if args.subject else Task.EDIT
    one_image.make(args, task, [args.image, *args.subject], mask=args.mask, paste_back=args.paste_back)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError, interrupted=command.STARTS_ANEW)

"""Make an image from words and subjects.

    mige generate "a<imagehere>on a beach" --subject dog.jpg
    mige generate "image 1 beside image 2" --subject dog.jpg cup.jpg --size 768x512 --output both.png

The subjects are named "image 1", "image 2", ... or by one `<imagehere>` each, in order. The PNG holds its settings as
text.
"""

import argparse
from collections.abc import Sequence

from mige.cli import command, one_image
from mige.tasks import Task


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    return one_image.parse(command.parser(__doc__), argv, lambda args: "generated.png")


def run(args: argparse.Namespace) -> None:
    """What the command does, with the arguments of `parse`."""
    one_image.make(args, Task.SUBJECT, args.subject)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError, interrupted=command.STARTS_ANEW)

"""What all scripts share: arguments that are checked before anything heavy is imported, errors as one line."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mige.utils.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


RESUMES = "what is finished is kept, the same command resumes"
STARTS_ANEW = "nothing was written, the same command starts anew"


class Parser(argparse.ArgumentParser):
    """A parser that shows a module's docstring as it is, and says how a value that looks like an option is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Print the message with the way to `--help`, and end with exit code 2."""
        if option := re.fullmatch(r"argument (?:-\w/)?(--[\w-]+).*: expected (?:one|at least one) argument", message):
            message += f' (a value that begins with "-" is given as {option[1]}="-...")'
        super().error(message)


def parser(description: str | None) -> Parser:
    """The parser of a script, whose docstring is its help."""
    return Parser(description=description)


def guarded(
    run: Callable[[argparse.Namespace], int | None],
    args: argparse.Namespace,
    *known: type[Exception],
    interrupted: str = RESUMES,
) -> int:
    """Run a command and give back its exit code; 130 after Ctrl-C, with one line that says what is left: `interrupted`.

    What users can mend (`UserError`, OSError, `known`) raises SystemExit with one line, exit code 1.
    """
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        print(f"\ninterrupted: {interrupted}", file=sys.stderr, flush=True)  # below a progress bar
        return INTERRUPTED
    except (UserError, OSError, *known) as error:
        raise SystemExit(f"error: {error}") from error


def add_lora(parser: argparse.ArgumentParser) -> None:
    """The option `--lora`, given once for each folder: a list of (folder, scale)."""
    parser.add_argument(
        "--lora",
        action="append",
        type=lora,
        default=[],
        metavar="PATH[:SCALE]",
        help="adapters, in diffusers' or PEFT's layout (of a training run: checkpoints/step-.../lora); may be repeated",
    )


def lora(text: str) -> tuple[str, float]:
    """The type of `--lora`: a folder or file, and its scale behind a colon, 1 without.

    Raises argparse.ArgumentTypeError for a scale that is not finite.
    """
    path, colon, scale = text.rpartition(":")
    if not (colon and path) or Path(text).exists():
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:  # a colon of the path
        return text, 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"the scale is {scale}, expected a finite number")
    return path, value


def folder_to_write(text: str) -> Path:
    """The type of an option that names a folder to make or to write into.

    Raises argparse.ArgumentTypeError for a file, a link to nothing and a place where nothing can be written.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name a folder")
    path = Path(text)
    try:
        if problem := _unwritable(path):
            raise argparse.ArgumentTypeError(problem)
    except OSError as error:  # a name too long, a folder that may not be entered
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}; name another folder") from error
    return path


def _unwritable(path: Path) -> str | None:
    """Why no folder can be made at a path; what is to be made, or is there, is told by its nearest existing parent."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            return f"{place} is a link to nothing ({place.readlink()}); name a folder"
        if place.is_dir():
            writable = os.access(place, os.W_OK | os.X_OK)
            return None if writable else f"{place} is not writable; change its permissions or name another"
        if place.exists():
            return f"{place} is a file; name a folder"
    return None


def check_device(parser: argparse.ArgumentParser, name: str | None) -> str:
    """The device by its name, a GPU by default where there is one; a parser's error where there is none of it."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")
    return name


def quiet_libraries() -> None:
    """No progress bars of loading: it takes seconds, and the command has its own bar."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()

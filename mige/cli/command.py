"""What all scripts share: arguments that are checked before anything heavy is imported, errors as one line."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from mige.utils.errors import UserError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def guarded(run: Callable[[argparse.Namespace], int | None], args: argparse.Namespace, *known: type[Exception]) -> int:
    """Run a command and give back its exit code; 130 after Ctrl-C.

    What users can mend (`UserError`, OSError, `known`) raises SystemExit with one line, exit code 1.
    """
    try:
        return run(args) or 0
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept, the same command resumes", flush=True)
        return INTERRUPTED
    except (UserError, OSError, *known) as error:
        raise SystemExit(f"error: {error}") from error


def folder_to_write(text: str) -> Path:
    """The type of an option that names a folder to make or to write into.

    Raises argparse.ArgumentTypeError for a file, a link to nothing and a place where nothing can be written.
    """
    path = Path(text)
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise argparse.ArgumentTypeError(f"{place} is a link to nothing ({place.readlink()}); name a folder")
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                raise argparse.ArgumentTypeError(f"{place} is not writable; change its permissions or name another")
            return path
        if place.exists():
            raise argparse.ArgumentTypeError(f"{place} is a file; name a folder")
    return path


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

"""Edit and generate images with multimodal instructions, serve a model, train one, evaluate one.

    mige edit photo.jpg "make it snowy"
    mige generate "a<imagehere>on a beach" --subject dog.jpg
    mige serve

The model is --model, or MIGE_MODEL, or what `mige download` made.
"""

import importlib
import sys
from collections.abc import Sequence

from mige import __version__
from mige.cli import command

COMMANDS = {  # each a module of mige.cli, and what it does
    "edit": ("edit", "change an image as an instruction says, with subjects from other images or without"),
    "generate": ("generate", "make an image from words and subjects"),
    "serve": ("web_demo", "the page in a browser, and the HTTP endpoint"),
    "train": ("train_mige", "train from a config file"),
    "evaluate": ("evaluate", "score results on a benchmark"),
    "download": ("download_weights", "fetch the released weights and convert them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the arguments behind a command's name to its module, the only one that is imported; the exit code."""
    parser = command.parser(__doc__)
    parser.prog = "mige"
    parser.add_argument("--version", action="version", version=f"mige {__version__}")
    shown = "".join(f"\n  {name:10}{does}" for name, (_, does) in COMMANDS.items())
    parser.epilog = f"commands (mige COMMAND --help tells more):{shown}"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    given = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(given[:1]).command
    sys.argv[0] = f"mige {name}"  # what its help and its errors are headed with
    return importlib.import_module(f"mige.cli.{COMMANDS[name][0]}").main(given[1:])


if __name__ == "__main__":
    sys.exit(main())

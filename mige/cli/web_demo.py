"""Serve the page in a browser: generate with a subject, edit an image, edit with a subject.

    python infer_scripts/web_demo.py
    python infer_scripts/web_demo.py --model output/pretrained_models/mige --port 8000
    python infer_scripts/web_demo.py --model output/pretrained_models/mige --offload --t5-bits 8 --auth @users.txt

Installed, it is `mige serve`. Needs the extra "web": pip install -e ".[web]" (`make web`). See docs/web.md.
"""

import argparse
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mige.cli import command, model_options, places
from mige.cli.places import MINI


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument(
        "--model", help=f"checkpoint folder, or a name on the hub (default: MIGE_MODEL, where it is set; else {MINI})"
    )
    model_options.add(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--public-host", action="append", default=[], metavar="NAME",
        help="a name by which visitors reach the page, as mige.example.org; may be given again",
    )  # fmt: skip
    parser.add_argument("--root-path", default="", help="where a proxy serves the page, as /mige (it strips that)")
    parser.add_argument(
        "--auth", action="append", default=[], type=users, metavar="NAME:PASSWORD",
        help="who may enter; or @FILE with a line each; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--safety-checker", metavar="MODULE:FUNCTION",
        help="given images, it says of each whether it is withheld; sees what comes in and what goes out",
    )  # fmt: skip
    parser.add_argument("--share", action="store_true", help="a public link through Gradio's servers; needs --auth")
    parser.add_argument("--no-page", action="store_true", help="the HTTP endpoint alone")
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("MIGE_API_KEY"),
        help="what requests to the HTTP endpoint have to bear (default: MIGE_API_KEY, where it is set; else nothing)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.model = places.model(args.model, MINI)
    if args.model is None:
        parser.error(places.NO_MODEL)
    args.auth = {name: password for given in args.auth for name, password in given.items()}
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; expected 1 to 65535")
    for name in args.public_host:
        if not re.fullmatch(r"[\w.-]+", name):
            parser.error(f"--public-host is {name!r}; expected a name alone, as mige.example.org")
    if args.root_path and not re.fullmatch(r"(/[\w.-]+)+", args.root_path):
        parser.error(f"--root-path is {args.root_path!r}; expected a path such as /mige")
    if args.share and not args.auth:
        parser.error("--share makes the page public: say with --auth NAME:PASSWORD who may enter")
    if args.no_page and (args.auth or args.share or args.root_path):
        parser.error("--auth, --share and --root-path are the page's: leave them out with --no-page")
    if args.api_key is not None and not re.fullmatch(r"[!-~]{1,200}", args.api_key):
        parser.error("--api-key is empty, too long or has other than visible ASCII characters; name another")
    return args


def users(text: str) -> dict[str, str]:
    """The type of `--auth`: passwords by name, of "name:password" or of "@FILE" with such lines.

    Raises argparse.ArgumentTypeError, without a password in its message, for anything else.
    """
    lines, where = [text], "it"
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise argparse.ArgumentTypeError(f"{path} cannot be read: {error}; give a text file") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        if text.startswith("@"):
            where = f"line {number} of {text[1:]}"
        name, colon, password = line.partition(":")
        if line.strip() and not (name and colon and password):
            raise argparse.ArgumentTypeError(f"{where} is no NAME:PASSWORD; neither of the two may be empty")
        found |= {name: password} if line.strip() else {}
    if not found:
        raise argparse.ArgumentTypeError(f"{text[1:] or text!r} names nobody; write NAME:PASSWORD")
    return found


def load_function(name: str) -> Callable[[Any], Any]:
    """A function by "module:function"; raises ValueError where there is none."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--safety-checker is {name!r}; expected MODULE:FUNCTION")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--safety-checker {name}: {error}; is its folder on PYTHONPATH?") from error
    if not callable(found):
        raise ValueError(f"--safety-checker {name} is a {type(found).__name__}; expected a function")
    return found


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.inference.pipeline import MIGEPipeline
    from mige.web.service import GenerationService

    if args.no_page:
        from mige.web.api_server import serving_endpoint as serving
    else:
        from mige.web.page import serving

    model_options.resolve(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes then, too
    command.quiet_libraries()
    folder = MIGEPipeline.locate(args.model)
    pipeline = model_options.load(args, folder, args.device, verified=False)
    where = dict(host=args.host, port=args.port, public_hosts=args.public_host, api_key=args.api_key)
    if not args.no_page:
        where |= dict(root_path=args.root_path, users=args.auth, share=args.share)
    checker = args.safety_checker and load_function(args.safety_checker)
    service = GenerationService(pipeline, model_options.label(args, folder), adapters=args.lora, safety_checker=checker)
    with serving(service, **where) as address:
        print(f"{'Listening at' if args.no_page else 'Open'} {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    code = command.guarded(run, parse(argv), ValueError)
    return 0 if code == command.INTERRUPTED else code  # Ctrl-C is how it ends

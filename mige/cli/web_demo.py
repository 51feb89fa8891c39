"""Serve the page in a browser: generate with a subject, edit an image, edit with a subject.

    python infer_scripts/web_demo.py
    python infer_scripts/web_demo.py --model output/pretrained_models/mige --port 8000

Needs the extra "web": pip install -e ".[web]" (`make web` does that). See docs/web.md.
"""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import MINI


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--model", default=str(MINI), help="checkpoint folder, or a name on the hub (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--public-host", action="append", default=[], metavar="NAME",
        help="a name by which visitors reach the page, as mige.example.org; may be given again",
    )  # fmt: skip
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    command.add_lora(parser)
    args = parser.parse_args(argv)
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; expected 1 to 65535")
    for name in args.public_host:
        if not re.fullmatch(r"[\w.-]+", name):
            parser.error(f"--public-host is {name!r}; expected a name alone, as mige.example.org")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    import torch

    from mige.inference.adapters import add_adapters
    from mige.inference.pipeline import MIGEPipeline
    from mige.web.page import serving
    from mige.web.service import GenerationService

    args.device = command.check_device(command.parser(None), args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes then, too
    command.quiet_libraries()
    folder = MIGEPipeline.locate(args.model)
    pipeline = MIGEPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)
    for path, scale in args.lora:
        add_adapters(pipeline, path, scale)
    name = " + ".join([folder.resolve().name, *(f"{Path(path).name}:{scale:g}" for path, scale in args.lora)])
    service = GenerationService(pipeline, name)
    with serving(service, host=args.host, port=args.port, public_hosts=args.public_host) as address:
        print(f"Open {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    code = command.guarded(run, parse(argv), ValueError)
    return 0 if code == command.INTERRUPTED else code  # Ctrl-C is how it ends

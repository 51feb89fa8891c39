"""Serve the page in a browser: generate with a subject, edit a picture, edit with a subject.

    python infer_scripts/web_demo.py
    python infer_scripts/web_demo.py --model output/pretrained_models/mige --port 8000

Needs the extra "web": pip install -e ".[web]" (`make web` does that). See docs/web.md.
"""

import argparse
import signal
import sys
import threading

import diffusers
import torch
import transformers

from mige.checkpoints.folder import CheckpointError
from mige.inference.pipeline import MIGEPipeline
from mige.web.page import serving
from mige.web.service import GenerationService

MODEL = "output/pretrained_models/mige-mini"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="checkpoint folder, or a name on the hub (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    args = parser.parse_args()
    if args.port is not None and not 1 <= args.port <= 65535:
        parser.error(f"--port is {args.port}; expected 1 to 65535")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes then, too
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = MIGEPipeline.locate(args.model)
    pipeline = MIGEPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device)
    with serving(GenerationService(pipeline, folder.resolve().name), host=args.host, port=args.port) as address:
        print(f"Open {address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")

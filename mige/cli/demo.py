"""Show the trained small model at work: a case of each of the world's sixteen tasks, and one of a fresh seed.

    python tools/demo.py
    python tools/demo.py --seed 7 --output output/demo_7

The prepared cases are the mini-bench's first about an unseen subject, whatever comes of them. Makes OUTPUT/index.html,
OUTPUT/contact_sheet.png, OUTPUT/results.jsonl and OUTPUT/images/.
"""

import argparse
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command
from mige.cli.places import MINI, MINI_STUDENT


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--model", default=str(MINI), help="checkpoint folder (%(default)s)")
    parser.add_argument("--student", help=f"a few-step student, a model or adapters, shown beside it ({MINI_STUDENT})")
    parser.add_argument(
        "--output", type=command.folder_to_write, default=Path("output/demo"), help="folder to make (%(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of the fresh case (another one at every run)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (%(default)s; a student has its own)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (the faster one here)")
    args = parser.parse_args(argv)
    if args.student is None and args.model == str(MINI) and MINI_STUDENT.is_dir():
        args.student = str(MINI_STUDENT)
    args.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if args.seed < 0 or args.steps < 1:
        parser.error(f"--seed is {args.seed}, --steps {args.steps}; expected >= 0 and >= 1")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    import torch

    from mige.mini.demo import answer, chosen, faster_dtype, load, pages
    from mige.utils.files import write_text
    from mige.utils.progress import Progress

    command.quiet_libraries()
    dtype = args.dtype or faster_dtype()
    print(f"{dtype} weights; the fresh case has --seed {args.seed}")
    pipelines = load(args, getattr(torch, dtype))
    for folder in ("images", "inputs"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    cards = [
        answer(pipeline, one, args)
        for one in Progress(chosen(args.seed), unit="case", desc="demo")
        for pipeline in pipelines
    ]
    rows = [{"id": c.output.stem, "prompt": c.one.case.prompt, "scores": c.scores, "seconds": c.remark} for c in cards]
    write_text(args.output / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pages(cards, args, dtype)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(
        run, parse(argv), interrupted="images that were made are kept, the same command makes all anew"
    )

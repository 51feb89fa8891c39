"""Run MIGE on a file of records, or on one case from the command line.

    python infer_scripts/infer.py --model output/pretrained_models/mige --records example_data/subject.json
    python infer_scripts/infer.py --model output/pretrained_models/mige \\
        --prompt "replace the cup in<imagehere>with the<imagehere>" \\
        --reference coffee.jpg flower.jpg --source coffee.jpg --output output/my_cup

On several GPUs, each taking its share of the records: accelerate launch infer_scripts/infer.py ...

Finished records are skipped on a second run. Nothing runs until every record is found good; with --keep-going the good
ones run, the bad ones go to failures.jsonl, and the exit code is 3.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command, model_options
from mige.tasks import Task

if TYPE_CHECKING:
    from mige.data.records import Report

SOME_FAILED = 3


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line; ends with a message for those that make no run."""
    parser = _parser()
    args = parser.parse_args(join_text(sys.argv[1:] if argv is None else argv))
    if (args.records is None) == (args.prompt is None):
        parser.error("give either --records or --prompt")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    sides = args.height is not None or args.width is not None
    if args.size is not None and sides:
        parser.error(f"--size is {args.size}, but --height or --width is given too: leave one of them out")
    if args.size is None:
        args.size = "native" if sides or args.noise == "official" else "source"
    if args.mask is not None and args.prompt is None:
        parser.error('--mask belongs to the one case of --prompt; records have a "mask_path" of their own')
    if args.reuse < 1 or (args.reuse > 1 and not args.compile):
        parser.error(f"--reuse must be at least 1, and more only with --compile, got {args.reuse}")
    files = [file.resolve() for file in args.records or []]
    if twice := next((file for n, file in enumerate(files) if file in files[:n]), None):
        parser.error(f"--records: {twice} is given twice; its records would be made once")
    if args.prompt is None and args.id != parser.get_default("id"):
        parser.error("--id names the one case of --prompt; records have ids of their own")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = command.parser(__doc__)
    parser.add_argument(
        "--model",
        required=True,
        help="checkpoint folder (of a training run too: checkpoints/step-.../model), or a name on the hub",
    )
    parser.add_argument("--records", nargs="+", type=Path, help=".json or .jsonl files")
    parser.add_argument("--root", type=Path, help="what paths in the records are relative to (default: their file)")
    parser.add_argument("--prompt", help="one case: text with <imagehere> for every reference")
    parser.add_argument("--reference", nargs="+", default=[], help="one case: the images, in order")
    parser.add_argument("--source", help="one case: the image to edit")
    parser.add_argument("--mask", help="one case: an image of the source's size, white where it may change")
    parser.add_argument("--id", default="image", help="one case: its name in the run folder (default: %(default)s)")
    parser.add_argument("--task", type=Task, choices=list(Task), help="insist on this task")
    parser.add_argument(
        "--output", type=command.folder_to_write, default=Path("output/infer"), help="run folder (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the few-step student's own, else 50 or 60 (edits)")
    parser.add_argument("--guidance", type=float, help="text guidance (default: 7 subject-driven, 5 edits)")
    parser.add_argument("--source-guidance", type=float, help="default: 1")
    parser.add_argument(
        "--size",
        help="source (the default): edits have their source's aspect ratio, all of it; native: the official square; or "
        "an aspect ratio such as 3:2; or width and height in px such as 768x512",
    )
    parser.add_argument("--long-side", type=int, help="px of the longer side at most (default: the native area)")
    parser.add_argument("--height", type=int, help="in place of --size: multiple of 16 px (default: the model's)")
    parser.add_argument("--width", type=int, help="in place of --size: multiple of 16 px (default: the model's)")
    parser.add_argument("--paste-back", action="store_true", help="edits at their source's own resolution")
    parser.add_argument("--batch-size", type=int, help="default: 5 subject-driven, 25 edits")
    model_options.add(parser)
    parser.add_argument(
        "--reuse", type=int, default=1, help="approximate, with --compile: whole DiT every so many steps"
    )
    parser.add_argument(
        "--ignore-profiles", action="store_true", help="take the references' colours as sRGB, as the official code does"
    )
    parser.add_argument("--noise", choices=["record", "official"], default="record", help="see docs/inference.md")
    parser.add_argument("--keep-going", action="store_true", help="run the good records though others are bad")
    parser.add_argument(
        "--contact-sheets", action="store_true", help="draw them for more than 50 records too: a PNG for each 50"
    )
    parser.add_argument("--note", default="", help="a line on top of the result pages")
    return parser


def join_text(argv: Sequence[str]) -> list[str]:
    """Texts may begin with a hyphen: "--prompt", "-1 on a sign" is read as "--prompt=-1 on a sign"."""
    joined, rest = [], list(argv)
    while rest:
        option = rest.pop(0)
        if option in ("--prompt", "--note") and rest and rest[0].startswith("-") and not rest[0].startswith("--"):
            option = f"{option}={rest.pop(0)}"
        joined.append(option)
    return joined


def read(args: argparse.Namespace) -> "Report":
    """The records of files, or the one that the arguments describe."""
    from mige.data import parsing, records

    if args.records:
        return parsing.read_records(args.records, root=args.root, task=args.task)
    row = {"id": args.id, "multi_prompt": args.prompt, "entity_path": args.reference}
    row["source_path"] = [args.source] * bool(args.source)
    row["mask_path"] = args.mask
    root = args.root or Path()
    record, issues = parsing.make_record(row, where="command line", root=root, default_id=args.id, task=args.task)
    return records.Report([record] if record else [], issues)


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    from accelerate import PartialState

    from mige.checkpoints.lora import check_lora
    from mige.inference import run as inference
    from mige.inference.pipeline import MIGEPipeline

    model_options.resolve(args)
    command.quiet_libraries()
    one = args.lora[0][0] if [scale for _, scale in args.lora] == [1.0] else None
    given = vars(args) | {"lora": one, "loras": [list(pair) for pair in args.lora] if args.lora and not one else None}
    settings = inference.Settings(**{field.name: given[field.name] for field in fields(inference.Settings)})
    state = PartialState(cpu=args.device == "cpu") if "WORLD_SIZE" in os.environ else None
    main_process = state is None or state.is_main_process
    device = args.device if state is None else state.device
    model = MIGEPipeline.locate(args.model)
    opened = inference.OpenedRecords(ignore_profiles=settings.ignore_profiles)
    report = inference.check(read(args), model, settings, opened)
    for path, _ in args.lora:
        check_lora(model, Path(path))
    if report.issues and main_process:
        print(report.text(), file=sys.stderr)
    if report.errors and not (args.keep_going and report.records):
        return 1
    with ExitStack() as held:
        if main_process:
            held.enter_context(inference.claim(args.output))  # before the weights load, and until the pages are written
            inference.check_folder(args.output, settings, report.records)
            listed = inference.write_failures(report, args.output)
            if report.errors:
                print(f"listed in {listed}", file=sys.stderr)
        pipeline = model_options.load(args, model, device, verified=True)  # by `check`
        options = {
            "batch_size": args.batch_size,
            "note": args.note,
            "sheets": args.contact_sheets or None,
            "state": state,
            "opened": opened,
        }
        inference.run(report.records, pipeline, settings, args.output, **options)
    if main_process:
        made, page = len(report.records), args.output / "index.html"
        sheet = args.output / "contact_sheet.png"
        print(f"{made} images: open {page}" + (f" or {sheet}" if sheet.exists() else ""))
    return SOME_FAILED if report.errors else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), ValueError)

"""What `mige edit` and `mige generate` share: options, and one image made as the page makes it."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mige.cli import command, model_options, places
from mige.tasks import Task


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, output: Callable[[argparse.Namespace], str]
) -> argparse.Namespace:
    """The arguments of a parser that has the command's own already; `output` names the file where nobody does."""
    parser.add_argument("prompt", help="the instruction")
    parser.add_argument("--subject", type=Path, nargs="+", default=[], metavar="IMAGE", help="images of subjects")
    parser.add_argument("--output", "-o", type=Path, help="PNG to make (default: beside you, named after the image)")
    parser.add_argument("--model", help="checkpoint folder, or a name on the hub (default: MIGE_MODEL)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--steps", type=int, help="default: the model's own for the task")
    parser.add_argument("--guidance", type=float, help="towards the instruction; default: the model's own")
    parser.add_argument("--source-guidance", type=float, help="towards the edited image; default: the model's own")
    parser.add_argument(
        "--size",
        default="source",
        help="source: edits have their image's aspect ratio; native: the model's square; 3:2; 768x512 (%(default)s)",
    )
    parser.add_argument("--long-side", type=int, help="px of the longer side at most (default: the native area)")
    model_options.add(parser)
    args = parser.parse_args(argv)
    args.output = args.output or Path(output(args))
    if args.output.suffix.lower() != ".png":
        parser.error(f"--output is {args.output}; expected a name that ends in .png")
    if args.output.exists():
        parser.error(f"--output: {args.output} is already there; name another file, or delete it")
    if not args.output.parent.is_dir():
        parser.error(f"--output: {args.output.parent} is no folder; make it, or name another")
    args.model = places.model(args.model)
    if args.model is None:
        parser.error(places.NO_MODEL)
    return args


def make(args: argparse.Namespace, task: Task, images: Sequence[Path], **of_edits: Any) -> None:
    """Make the image and write it; raises RefusedError and other ValueErrors for what cannot run.

    of_edits: fields of a request that edits alone have: `mask`, `paste_back`.
    """
    from mige.inference.pipeline import MIGEPipeline
    from mige.inference.shapes import SizeWish
    from mige.utils.errors import UserError
    from mige.web.api_prompt import read_prompt
    from mige.web.provenance import save_with_settings
    from mige.web.service import GenerationService, Made, Request

    wish = SizeWish(args.size, long_side=args.long_side)
    reading = read_prompt(task, args.prompt, len(images))
    mask = of_edits.get("mask")
    if missing := [path for path in [*images, *([mask] if mask else [])] if not path.is_file()]:
        raise UserError(f"{missing[0]} is no file; give the path of an image")
    model_options.resolve(args)
    command.quiet_libraries()
    folder = MIGEPipeline.locate(args.model)
    pipeline = model_options.load(args, folder, args.device, verified=False)
    service = GenerationService(pipeline, model_options.label(args, folder), adapters=args.lora)
    usual = service.defaults(task)
    request = Request(
        task,
        args.prompt,
        tuple(images),
        (args.seed,),
        usual.steps if args.steps is None else args.steps,
        usual.guidance if args.guidance is None else args.guidance,
        usual.source_guidance if args.source_guidance is None else args.source_guidance,
        width=0,
        height=0,
        reading=reading,
        wish=None if wish == SizeWish() else wish,  # the default is every request's
        **of_edits,
    )
    try:
        for event in service.run(request, previews=False):
            if isinstance(event, Made):
                save_with_settings(event.pictures[0], args.output, event.settings[0])
                print(f"{args.output}: made in {event.seconds:.1f} s")
    finally:
        service.close()

"""What `mige edit` and `mige generate` share: options, and one image made as the page makes it."""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

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
        "--size", type=_size, default=(0, 0), metavar="WxH", help="px (default: an edit's as its image)"
    )
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


def _size(text: str) -> tuple[int, int]:
    """The type of `--size`: width and height, px."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected one such as 768x512")
    return int(match[1]), int(match[2])


def make(args: argparse.Namespace, task: Task, images: Sequence[Path], mask: Path | None) -> None:
    """Make the image and write it; raises RefusedError (a ValueError) for what cannot run."""
    from mige.inference.pipeline import MIGEPipeline
    from mige.utils.errors import UserError
    from mige.web.api_prompt import read_prompt
    from mige.web.provenance import save_with_settings
    from mige.web.service import GenerationService, Made, Request

    reading = read_prompt(task, args.prompt, len(images))
    if missing := [path for path in [*images, *([mask] if mask else [])] if not path.is_file()]:
        raise UserError(f"{missing[0]} is no file; give the path of an image")
    model_options.resolve(args)
    command.quiet_libraries()
    folder = MIGEPipeline.locate(args.model)
    pipeline = model_options.load(args, folder, args.device, verified=False)
    service = GenerationService(pipeline, model_options.label(args, folder), adapters=args.lora)
    usual, native = service.defaults(task), service.pipeline.sizes.native
    width, height = (native, native) if task is Task.SUBJECT and args.size == (0, 0) else args.size
    request = Request(
        task,
        args.prompt,
        tuple(images),
        (args.seed,),
        usual.steps if args.steps is None else args.steps,
        usual.guidance if args.guidance is None else args.guidance,
        usual.source_guidance if args.source_guidance is None else args.source_guidance,
        width,
        height,
        mask=mask,
        reading=reading,
    )
    try:
        for event in service.run(request, previews=False):
            if isinstance(event, Made):
                save_with_settings(event.pictures[0], args.output, event.settings[0])
                print(f"{args.output}: made in {event.seconds:.1f} s")
    finally:
        service.close()

"""From nothing to the released model in one command: fetch the official files that are needed, check and convert them.

    python tools/download_weights.py                    # the released weights -> output/pretrained_models/mige
    python tools/download_weights.py --kind training --output output/pretrained_models/start

Files go to output/pretrained_models/official and may be deleted afterwards.
Cut off, the same command resumes. HF_ENDPOINT and HF_TOKEN hold as for the hub's own tools.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mige.cli import command, convert_checkpoint
from mige.cli.places import CONFIGS

MODELS = Path("output/pretrained_models")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("--kind", choices=["release", "training"], default="release",
                        help="the released model, or what training starts from (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--output", type=command.folder_to_write, help=f"folder to make (default: {MODELS}/mige or start)"
    )
    parser.add_argument("--files", type=command.folder_to_write, default=MODELS / "official",
                        help="where the official files are kept (default: %(default)s)")  # fmt: skip
    parser.add_argument("--repository", help="on the hub (default: the authors' own)")
    parser.add_argument("--revision", help="branch, tag or commit (default: the newest)")
    parser.add_argument("--config", type=Path, default=CONFIGS / "mige_512.py", help="sizes (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as in the files")
    args = parser.parse_args(argv)
    args.output = args.output or MODELS / ("mige" if args.kind == "release" else "start")
    if args.output.exists():
        parser.error(f"--output: {args.output} is already there; name another folder, or delete it")
    return args


def run(args: argparse.Namespace) -> int:
    """What the script does, with the arguments of `parse`; returns the exit code."""
    from mige.checkpoints.download import REPOSITORY, download

    files = download(args.files, args.kind, repository=args.repository or REPOSITORY, revision=args.revision)
    given = {"vae": files["the VAE's config"][0].parent, "t5": files["T5's config"][0].parent}
    if args.kind == "release":
        given["model"] = files["the trained model"][0]
    else:
        given |= {"pixart": files["PixArt-alpha"][0], "eva": files["EVA-ViT-g"][0], "blip2": files["BLIP-2"][0]}
    arguments = [args.kind, "--output", args.output, "--config", args.config]
    arguments += [text for name, path in given.items() for text in (f"--{name}", path)]
    arguments += ["--dtype", args.dtype] if args.dtype else []
    return convert_checkpoint.main([str(argument) for argument in arguments])


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv))

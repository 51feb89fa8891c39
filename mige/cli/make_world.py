"""Write a miniature world to disk: ordinary records and images, for the ordinary trainer and for `infer.py`.

    python tools/make_world.py output/world --cases 10000
    python tools/make_world.py output/world_unseen --cases 200 --unseen --kinds one_reference replace_by_reference
    python tools/make_world.py output/second --cases 10000 --world second

makes OUT/records.jsonl and OUT/images/ (PNG, 128 px; of the second world 256 px). Case N depends on the world, the
seed, the kinds and N alone, so a larger set begins with the smaller one. Most subjects of a reference are augmented, as
in training, but not those that training holds out.
"""

import argparse
from collections.abc import Sequence

from mige.cli import command
from mige.cli.choices import WORLD_KINDS

KINDS = tuple(kind for kind in WORLD_KINDS if kind != "text_to_image")  # a record has a reference


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, as `--help` lists them; neither torch nor transformers is imported for it."""
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=command.folder_to_write, metavar="OUT", help="made; must not be there yet")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=["first", "second"], default="first", help="(%(default)s)")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--unseen", action="store_true", help="about the subjects that training holds out")
    half.add_argument("--unseen-drawings", action="store_true",
                      help="second: about subjects of which training shows drawings by other hands")  # fmt: skip
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND",
                        help=f"of task, in the shares of training (all): {', '.join(KINDS)}")  # fmt: skip
    args = parser.parse_args(argv)
    if args.cases < 1 or args.first < 0 or args.seed < 0:
        parser.error(f"--cases is {args.cases}, --first {args.first}, --seed {args.seed}; expected >= 1, >= 0 and >= 0")
    if args.unseen_drawings and args.world != "second":
        parser.error("--unseen-drawings belongs to --world second: a subject of the first has one drawing")
    return args


def run(args: argparse.Namespace) -> None:
    """What the script does, with the arguments of `parse`."""
    from mige.data.synthetic import tasks
    from mige.data.synthetic.world import WORLDS
    from mige.data.synthetic.write_records import write
    from mige.utils.files import atomic_directory

    mixture = {kind: tasks.MIXTURE[kind] for kind in args.kinds}
    world, half = WORLDS[args.world], 2 if args.unseen_drawings else int(args.unseen)
    cases, subjects = range(args.first, args.first + args.cases), list(world.splits().values())[half]
    with atomic_directory(args.folder) as folder:
        counts = write(folder, args.seed, cases, subjects, mixture, augment=half == 0, world=world)
    for kind in args.kinds:
        print(f"{counts[kind]:8d} {kind}")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then import, then run; the exit code."""
    return command.guarded(run, parse(argv), interrupted=command.STARTS_ANEW)

"""How fast the miniature worlds are: cases/s that one process makes, images/s drawn, and how far a GPU's images differ.

    python benchmarks/bench_world.py
    python benchmarks/bench_world.py --images 8 --repeats 1 --device cpu --worlds second

A line a world and shape of images. `difference` is the largest of an image's mean absolute differences from a CPU's, in
[0, 1]; on a CPU it is 0.
"""

import argparse
import time

import numpy as np
from harness import Machine, Report, digits, parser

from mige.data.synthetic import tasks
from mige.data.synthetic.scenes import Scene, Scenes, draw
from mige.data.synthetic.world import WORLDS, World, frame

CHECKED = 24  # images compared with a CPU's


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--images", type=int, default=512, help="drawn together (%(default)s)")
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS), metavar="WORLD")
    return made.parse_args()


def measure(machine: Machine, args: argparse.Namespace, world: World, shape: tuple[int, int]) -> dict:
    """One line of a world and a shape."""
    subjects, started = world.splits()["seen"], time.perf_counter()
    scenes: list[Scene] = []
    cases = 0
    while len(scenes) < args.images:
        rng = np.random.default_rng([0, cases])
        case = tasks.sample(rng, subjects, augment=True, world=world, frame=frame(*shape))
        scenes += [case.target, *case.references]
        cases += 1
    made = Scenes.stack(scenes[: args.images])
    seconds = time.perf_counter() - started
    median = machine.median_seconds(lambda: draw(made, machine.device, shape, world), args.repeats)
    some = Scenes.stack(scenes[:CHECKED])
    apart = (draw(some, machine.device, shape, world).cpu() - draw(some, "cpu", shape, world)).abs() / 2
    return {
        "cases_per_s": digits(cases / seconds),
        "images_per_s": digits(args.images / median),
        "difference": digits(apart.mean(dim=(1, 2, 3)).max().item(), 2),
    }


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output)
    for key in args.worlds:
        for height, width in WORLDS[key].shapes:
            case = {"world": key, "shape": f"{height} x {width}"}
            report.attempt(case, lambda key=key, shape=(height, width): measure(machine, args, WORLDS[key], shape))


if __name__ == "__main__":
    main()

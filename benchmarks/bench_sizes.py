"""Edits of other sizes and shapes at full size, random weights: seconds and memory of calls, the VAE tiled or not.

    python benchmarks/bench_sizes.py --output sizes.jsonl        # ends after 400 s at most; needs no weights
    python benchmarks/bench_sizes.py --tiny --long-sides 128     # a tiny twin, on a CPU

One edit of a 3:2 photograph, with its shape, at each long side; 0 is the native area. Modes: "plain"; "tiled" is
`enable_vae_tiling`; "grouped" is diffusers' `enable_group_offload` at leaf level, last, as it cannot be undone. A line
of JSON a case: the size made, seconds of a call (the median), the peak of memory, and how far its image is from the
plain one's (PSNR, dB).
"""

import argparse
import statistics
from collections.abc import Sequence

import torch
from harness import ROOT, Machine, Report, ending_after, parser, table
from random_model import random_pipeline, samples
from torch import Tensor

from mige.tasks import Task

MODES = ("plain", "tiled", "grouped")
COLUMNS = ("mode", "width", "height", "seconds", "edits_a_second", "peak_gib", "psnr")


class Bench:
    """One pipeline, measured mode by mode."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args, self.machine = args, machine
        config = ROOT / "configs" / ("tiny.py" if args.tiny else "mige_512.py")
        self.pipeline = random_pipeline(config, machine.device, torch.bfloat16 if machine.on_gpu else torch.float32)
        [self.sample] = samples(Task.EDIT, 1)
        self.plain: dict[int, Tensor] = {}  # pixels by long side

    def prepare(self, mode: str) -> None:
        """Set the pipeline's mode."""
        self.pipeline.enable_vae_tiling() if mode == "tiled" else self.pipeline.disable_vae_tiling()
        if mode == "grouped":
            self.pipeline.to("cpu")
            self.pipeline.enable_group_offload(self.machine.device, torch.device("cpu"), offload_type="leaf_level")
        self.machine.free()

    def measure(self, long_side: int) -> dict:
        """The line of a size."""

        def call() -> Tensor:
            return self.pipeline(
                self.sample.prompt, source=self.sample.source, seed=0, long_side=long_side or None,
                num_inference_steps=self.args.steps, output_type="pt",
            ).images  # fmt: skip

        self.machine.reset_peak()
        made = call().cpu()
        seconds = statistics.median(self.machine.seconds(call) for _ in range(self.args.repeats))
        error = (made - self.plain.setdefault(long_side, made)).square().mean().clamp(min=1e-12)
        return {
            "width": made.shape[3],
            "height": made.shape[2],
            "seconds": round(seconds, 3),
            "edits_a_second": 1 / seconds,
            "peak_gib": self.machine.peak_gib(reserved=True),
            "psnr": round(-10 * error.log10().item(), 1),
        }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--long-sides", nargs="+", type=int, default=[0, 768, 1024, 1536], help="px")
    made.add_argument("--steps", type=int, help="default: the official ones")
    made.add_argument("--repeats", type=int, default=3, help="timed calls after a first one")
    made.add_argument("--tiny", action="store_true", help="configs/tiny.py")
    made.add_argument("--time-limit", type=float, default=400, help="seconds after which it ends, whatever it is at")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    with ending_after(args.time_limit):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """Every mode at every size, then the table."""
    machine = Machine(args.device)
    report = Report(machine, args.output, weights="random", steps=args.steps or "official")
    bench = Bench(args, machine)
    for mode in sorted(args.modes, key=MODES.index):
        bench.prepare(mode)
        for side in args.long_sides:
            report.attempt({"mode": mode, "long_side": side}, lambda side=side: bench.measure(side))
    print(table(report.lines, COLUMNS))


if __name__ == "__main__":
    main()

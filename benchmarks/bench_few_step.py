"""A few-step student at full size, random weights: seconds and images/s of whole calls, plain and compiled, by phase.

    python benchmarks/bench_few_step.py --output few_step.jsonl     # some 3 minutes on an H100; needs no weights
    python benchmarks/bench_few_step.py --tiny --batches 2 1        # a tiny twin, on a CPU

Editing in 4 steps of one branch. Modes: "plain"; "compiled" is `MIGEPipeline.compile`; "compiled+vae16" is that with
the VAE in bfloat16, which is then compiled too. A line of JSON for each batch of a mode: seconds of a call with images
as images in and out (the median; the first two calls, which compile and record, apart), milliseconds of every phase of
one more call that waits between them, and how far latents (relative L2) and images (PSNR, dB) are from the plain ones.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from harness import ROOT, Machine, Report, digits, ending_after, parser, table
from random_model import draw, random_pipeline, samples
from torch import Tensor

from mige.diffusion.few_step import FewStepSolver
from mige.diffusion.guidance import Guidance
from mige.inference.samples import Sample
from mige.tasks import Task
from mige.utils import images

MODES = ("plain", "compiled", "compiled+vae16")
COLUMNS = ("mode", "batch", "first_s", "second_s", "seconds", "images_a_second", "peak_gib", "latent_error", "psnr")
PHASES = ("prepare", "encode", "denoise", "decode", "to_pil")


class Bench:
    """One pipeline, measured mode by mode."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args, self.machine = args, machine
        config = ROOT / "configs" / ("tiny.py" if args.tiny else "mige_512.py")
        self.pipeline = random_pipeline(config, machine.device, torch.bfloat16 if machine.on_gpu else torch.float32)
        self.pipeline.scheduler = FewStepSolver(num_inference_steps=args.steps)
        self.vae = copy.deepcopy(self.pipeline.vae).cpu()
        self.plain: dict[int, tuple[Tensor, Tensor]] = {}  # latents and pixels by batch

    def prepare(self, mode: str) -> None:
        """Set the pipeline's mode; rounded weights of the VAE would stay rounded."""
        self.pipeline.vae = copy.deepcopy(self.vae).to(self.machine.device)
        if mode == "compiled+vae16":
            self.pipeline.vae_to_bfloat16()
        if mode != "plain":
            self.pipeline.compile()
        self.machine.free()

    def measure(self, batch: int) -> dict:
        """The line of a batch."""
        chosen = samples(Task.EDIT, batch)
        prompts, sources, seeds = [s.prompt for s in chosen], [s.source for s in chosen], list(range(batch))

        def call() -> None:
            self.pipeline(prompts, None, sources, seed=seeds, size="native")

        self.machine.reset_peak()
        first, second = self.machine.seconds(call), self.machine.seconds(call)
        call()  # after it nothing is new
        seconds = [self.machine.seconds(call) for _ in range(self.args.repeats if batch > 1 else 4 * self.args.repeats)]
        line = {
            "first_s": round(first, 2),
            "second_s": round(second, 3),
            "seconds": round(statistics.median(seconds), 4),
        }
        line |= {"least_s": round(min(seconds), 4), "images_a_second": round(batch / statistics.median(seconds), 2)}
        line["peak_gib"] = self.machine.peak_gib(reserved=True)
        runs = [self._phases(chosen) for _ in range(3)]
        line["ms"] = {name: round(statistics.median(run[0][name] for run in runs), 1) for name in PHASES}
        return line | self._deviation(batch, *runs[-1][1])

    @torch.no_grad()
    def _phases(self, chosen: list[Sample]) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
        """Milliseconds of every phase, and the latents and pixels made."""
        pipeline, noise, kept = self.pipeline, draw(self.pipeline, chosen), {}
        steps = {
            "prepare": lambda _: pipeline.prepare(chosen, noise),
            "encode": pipeline.encode,
            "denoise": lambda condition: pipeline.denoise(condition, noise, Guidance(Task.EDIT)),
            "decode": pipeline.decode,
            "to_pil": images.to_pil,
        }
        spent, result = {}, None
        for name, step in steps.items():
            started = time.perf_counter()
            result = kept[name] = step(result)
            self.machine.wait()
            spent[name] = 1000 * (time.perf_counter() - started)
        return spent, (kept["denoise"].cpu(), kept["decode"].cpu())

    def _deviation(self, batch: int, latents: Tensor, pixels: Tensor) -> dict:
        if batch not in self.plain:
            self.plain[batch] = latents, pixels
        wanted, exact = self.plain[batch]
        error = (pixels.clamp(-1, 1) - exact.clamp(-1, 1)).square().mean() / 4
        worst = ((latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).max()
        psnr = round(-10 * error.clamp(min=1e-12).log10().item(), 1)
        return {"latent_error": digits(worst.item()), "psnr": psnr}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--batches", nargs="+", type=int, default=[25, 1])
    made.add_argument("--steps", type=int, default=4)
    made.add_argument("--repeats", type=int, default=5, help="timed calls; four times as many of a single image")
    made.add_argument("--tiny", action="store_true", help="configs/tiny.py")
    made.add_argument("--time-limit", type=float, default=280, help="seconds after which it ends, whatever it is at")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    with ending_after(args.time_limit):
        measure(args)


def measure(args: argparse.Namespace) -> None:
    machine = Machine(args.device)
    report = Report(machine, args.output, steps=args.steps, weights="random")
    bench = Bench(args, machine)
    for mode in args.modes:
        bench.prepare(mode)
        for batch in args.batches:
            report.attempt({"mode": mode, "batch": batch}, lambda batch=batch: bench.measure(batch))
    rows = [line | {f"{name}_ms": ms for name, ms in line["ms"].items()} for line in report.lines]
    print(table(rows, [*COLUMNS, *(f"{name}_ms" for name in PHASES)]))


if __name__ == "__main__":
    main()

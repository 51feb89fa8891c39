"""Inference speed of the full-size model with random weights: s/image, images/s, TFLOP/s, share of the card, memory.

    python benchmarks/bench_inference.py                     # the table, on one GPU; needs no weights and no data
    python benchmarks/bench_inference.py --naive             # beside it, what the released code computes
    python benchmarks/bench_inference.py --cases dit/16/compiled edit/25/compiled@20 --time-limit 240
    python benchmarks/bench_inference.py --cases edit/1/compiled+offload --phases
    python benchmarks/bench_inference.py --tiny --steps 3    # a twin of a few hundred thousand parameters, on a CPU

A case is task/batch/mode, or task/batch/mode@steps. Tasks: subject, edit, subject_edit (whole calls at the official
steps and scales, encoding and decoding included) and dit (one forward pass of that many samples, 96 context positions;
no steps). Mode: "plain", "naive" (every step encodes again: all four slots of images, 256 positions, every branch; a
few steps are timed, the rest extrapolated), or any of these joined by "+": compiled, offload, vae16, t5-8, t5-4 (bits),
and, approximate, reuse2 to reuse5. Modes that rebuild the pipeline (offload, t5-8, t5-4) come last.

After an exact case of the same task, batch and steps, a case says how far it is off: `latent_error`, relative L2 of the
final latents, and `psnr` of the images in dB. Random weights make noise: trained ones deviate otherwise.

`peak_gib`: what whole calls, the first one and its captures included, took from the device ("call"); of a dit or a
naive case the steps alone ("denoise"). --phases makes one more call that waits between prepare, encode, denoise, decode
and to_pil: milliseconds of each, and its peak from an empty cache on.

FLOPs: branches x steps x DiT and the encoders once, as the exact computation needs them; the VAE is not counted, keys
and values of the context (1 % of the DiT) count at every step though "compiled" keeps them. The share is of the card's
bfloat16 matrix rate, measured first. A line of JSON a case, printed as it is measured; a case that fails says so and
the next one runs.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import ROOT, Machine, Report, digits, parser, table
from inference_case import APPROXIMATE, Case
from naive import naive_denoiser
from random_model import draw, random_pipeline, samples
from torch import Tensor

from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch, Guidance
from mige.diffusion.settings import resolve
from mige.inference.inputs import instruct
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise
from mige.models.fast_dit import FastDenoiser
from mige.tasks import TASKS, Task
from mige.training.flops import forward_flops
from mige.utils import images

CONTEXT = 96  # positions in the dit cases
TABLE = "dit/16/compiled dit/48/compiled edit/1/compiled subject/5/compiled edit/25/compiled edit/1/compiled+offload"
COLUMNS = ("case", "steps", "seconds_an_image", "images_a_second", "ms_a_sample", "tflops", "share", "call_gib",
           "denoise_gib", "latent_error", "psnr")  # fmt: skip


class Bench:
    """One pipeline, measured case by case."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args, self.machine, self.device, self.rate = args, machine, machine.device, machine.peak_flops
        self.pipeline, self.changed = self._random_pipeline(), []
        self.vae = copy.deepcopy(self.pipeline.vae).to("cpu")
        self.exact: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}  # latents, pixels by task, batch and steps

    def _random_pipeline(self) -> MIGEPipeline:
        return random_pipeline(self.args.config, self.device, getattr(torch, self.args.dtype))

    def measure(self, case: Case) -> dict:
        """The line of a case."""
        self._prepare(case)
        if case.task == "dit":
            return self._dit(case)
        chosen = samples(Task(case.task), case.batch)
        return (self._naive if case.mode == "naive" else self._call)(case, chosen, draw(self.pipeline, chosen))

    def _prepare(self, case: Case) -> None:
        if case.rebuilds != self.changed:
            self.pipeline = None
            self.machine.free()
            self.pipeline, self.changed = self._random_pipeline(), case.rebuilds
            for option in reversed(case.rebuilds):  # bits before off-loading
                change = self.pipeline.offload_encoders if option == "offload" else self.pipeline.quantise_text_encoder
                change(self.device if option == "offload" else int(option[-1]))
        pipeline = self.pipeline
        pipeline.is_compiled = "compiled" in case.options
        pipeline._fast = None  # what an earlier case captured would count as this one's memory
        pipeline.vae = copy.deepcopy(self.vae).to(self.device)  # rounded weights would stay rounded
        if "vae16" in case.options:
            pipeline.vae_to_bfloat16()
        self.machine.free()

    def _call(self, case: Case, chosen: list[Sample], noise: list[SampleNoise]) -> dict:
        steps, made = self._steps(case), None
        settings = {name: value for option in case.options for name, value in APPROXIMATE.get(option, {}).items()}

        def call() -> None:
            nonlocal made
            final = self.pipeline.run(chosen, noise, steps=steps, **settings)
            pixels = self.pipeline.decode(final)
            images.to_pil(pixels)  # arrives on the CPU, so the GPU has finished
            made = final, pixels

        self.machine.reset_peak()  # here, because a timed call after it would be slower: it empties the cache
        first, *seconds = [self.machine.seconds(call) for _ in range(1 + self.args.repeats)]
        line = self._line(case, chosen, steps, statistics.median(seconds)) | {"first_call_seconds": round(first, 2)}
        line |= self._deviation(case, steps, *(tensor.cpu() for tensor in made))
        line["peak_gib"] = {"call": self.machine.peak_gib(reserved=True)}
        if self.args.phases:
            line["ms"], peaks = self._phases(chosen, noise, steps, settings)
            line["peak_gib"] |= peaks
        return line

    def _deviation(self, case: Case, steps: int, latents: Tensor, pixels: Tensor) -> dict:
        """From the first exact case of this task, batch and number of steps, which this one may be."""
        key = case.task, case.batch, steps
        if key not in self.exact:
            if set(case.options) <= {"plain", "compiled", "offload"}:
                self.exact[key] = latents, pixels
            return {}
        wanted, exact_pixels = self.exact[key]
        error = (pixels.clamp(-1, 1) - exact_pixels.clamp(-1, 1)).square().mean() / 4
        psnr = -10 * error.clamp(min=1e-12).log10()
        return {
            "latent_error": digits(((latents - wanted).norm() / wanted.norm()).item()),
            "psnr": round(psnr.item(), 1),
        }

    def _phases(
        self, chosen: list[Sample], noise: list[SampleNoise], steps: int, settings: dict
    ) -> tuple[dict[str, float], dict[str, float | None]]:
        """Milliseconds and peak GiB of every phase of one more call, waiting between them."""
        pipeline, official = self.pipeline, Guidance(chosen[0].task)
        phases = {
            "prepare": lambda _: pipeline.prepare(chosen, noise),
            "encode": pipeline.encode,
            "denoise": lambda condition: pipeline.denoise(condition, noise, official, steps=steps, **settings),
            "decode": pipeline.decode,
            "to_pil": images.to_pil,
        }
        spent, peaks, result = {}, {}, None
        with torch.no_grad():
            for name, phase in phases.items():
                self.machine.reset_peak()
                before, result = result, None
                started = time.perf_counter()
                result = phase(before)
                self.machine.wait()
                spent[name] = round(1000 * (time.perf_counter() - started), 1)
                peaks[name] = self.machine.peak_gib(reserved=True)
        return spent, peaks

    @torch.no_grad()
    def _naive(self, case: Case, chosen: list[Sample], noise: list[SampleNoise]) -> dict:
        pipeline, steps = self.pipeline, self._steps(case)
        denoise = naive_denoiser(pipeline, chosen, noise)
        start = torch.stack([n.latent for n in noise]).to(self.device)
        times = [torch.tensor(t, device=self.device) for t in (999.0, 500.0, 1.0)]
        denoise(start, times[0])
        self.machine.reset_peak()
        a_step = statistics.median(self.machine.seconds(lambda t=t: denoise(start, t)) for t in times)
        ends = self.machine.seconds(lambda: naive_denoiser(pipeline, chosen, noise))
        ends += self.machine.seconds(lambda: images.to_pil(pipeline.decode(start)))
        line = self._line(case, chosen, steps, steps * a_step + ends)
        return line | {
            "seconds_a_step": round(a_step, 4),
            "extrapolated": True,
            "peak_gib": {"denoise": self.machine.peak_gib(reserved=True)},
        }

    def _steps(self, case: Case) -> int:
        return case.steps or self.args.steps or TASKS[case.task].steps

    def _line(self, case: Case, chosen: list[Sample], steps: int, seconds: float) -> dict:
        """The table's columns, from the median seconds of a whole call."""
        branches = len(resolve(self.pipeline.scheduler.config, Task(case.task)).branches)
        queries, most = self.pipeline.fusion.config.num_queries, self.pipeline.fusion.config.max_tokens
        work = 0.0
        for sample in chosen:  # of the exact computation, also where a mode does less
            context = min(instruct(sample, self.pipeline.tokenizer).length(queries), most)
            by_part = self._flops(context, len(sample.references))
            work += sum(by_part.values()) + (branches * steps - 1) * by_part["transformer"]
        return {
            "case": case.name,
            "steps": steps,
            "seconds": round(seconds, 3),
            "seconds_an_image": round(seconds / case.batch, 4),
            "images_a_second": round(case.batch / seconds, 3),
            "tflop_an_image": round(work / case.batch / 1e12, 2),
            **self._speed(work / seconds),
        }

    @torch.no_grad()
    def _dit(self, case: Case) -> dict:
        """One forward pass: milliseconds, and the error against float32 (relative L2 of the noise estimate)."""
        fusion, transformer = self.pipeline.fusion.config, self.pipeline.transformer
        cell, length = transformer.config.sample_size, min(CONTEXT, fusion.max_tokens)
        random = torch.Generator().manual_seed(0)
        x, source = (torch.randn(case.batch, 4, cell, cell, generator=random).to(self.device) for _ in range(2))
        context = torch.randn(case.batch, length, fusion.text_width, generator=random).to(self.device)
        condition, t = Condition(context, None, source), torch.tensor(500.0, device=self.device)
        denoise = self._forward(transformer, condition, t, "compiled" in case.options)
        denoise(x, t)
        self.machine.reset_peak()
        rounds = {} if self.machine.on_gpu else {"rounds": 2, "warm_up": 0}
        ms = self.machine.median_ms(lambda: denoise(x, t), **rounds)
        work = case.batch * self._flops(length, 0)["transformer"]
        line = {"case": case.name, "ms": round(ms, 3), "ms_a_sample": round(ms / case.batch, 3)}
        line |= {"tflop_a_sample": round(work / case.batch / 1e12, 3), **self._speed(1000 * work / ms)}
        line["peak_gib"] = {"denoise": self.machine.peak_gib(reserved=True)}
        if self.args.profile:
            self.machine.print_kernels(lambda: denoise(x, t), str(case))
        few = Condition(context[:2], None, source[:2])
        exact = self._forward(copy.deepcopy(transformer).float(), few, t, compiled=False)(x[:2], t)
        error = (self._forward(transformer, few, t, "compiled" in case.options)(x[:2], t) - exact).norm() / exact.norm()
        return line | {"error_to_float32": digits(error.item())}

    def _forward(self, transformer: torch.nn.Module, condition: Condition, t: Tensor, compiled: bool) -> Callable:
        whole, timestep_dtype = [Branch(1.0, False, False)], self.pipeline.model.timestep_dtype
        if compiled:
            return FastDenoiser(transformer, timestep_dtype).start(condition, whole, t.reshape(1))
        model = copy.copy(self.pipeline.model)
        model._modules = {**model._modules, "transformer": transformer}
        return lambda x, t: model.denoise(x, t.expand(len(x)), condition)[:, :4].float()

    def _flops(self, context: int, references: int) -> dict[str, float]:
        cells = self.pipeline.transformer.config.sample_size // self.pipeline.transformer.config.patch_size
        return forward_flops(self.pipeline.model, cells**2, context, references)

    def _speed(self, flops_a_second: float) -> dict:
        share = round(flops_a_second / self.rate, 3) if self.rate else None
        return {"tflops": round(flops_a_second / 1e12, 3), "share": share}


def cells(line: dict) -> dict:
    """A line with what the table's columns show."""
    peaks = {f"{phase}_gib": gib for phase, gib in line["peak_gib"].items()}
    return {**line, **peaks, "share": line["share"] and f"{line['share']:.1%}"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--cases", nargs="+", type=Case.read, default=[Case.read(case) for case in TABLE.split()])
    made.add_argument("--naive", action="store_true", help="every case of a task in mode naive too")
    made.add_argument("--tiny", action="store_true", help="configs/tiny.py")
    made.add_argument("--config", type=Path)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    made.add_argument("--steps", type=int, help="of cases that name none; default: the official ones of the task")
    made.add_argument("--repeats", type=int, default=3, help="timed calls after a first one; the median counts")
    made.add_argument("--phases", action="store_true", help="one more call: time and memory of every phase")
    made.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    made.add_argument("--profile", action="store_true", help="print the kernels of a dit case's forward pass")
    args = made.parse_args(argv)
    args.config = args.config or ROOT / "configs" / ("tiny.py" if args.tiny else "mige_512.py")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.naive:
        tasks = {(case.task, case.batch): None for case in args.cases if case.task != "dit"}
        args.cases += [Case(*key, "naive") for key in tasks]
    args.cases.sort(key=lambda case: case.rebuilds)  # a pipeline of each kind is built once, the untouched one first
    return args


def main() -> None:
    args, begun = parse(), time.perf_counter()
    machine = Machine(args.device)
    rate = machine.peak_flops and round(machine.peak_flops / 1e12, 1)
    report = Report(machine, args.output, dtype=args.dtype, matrix_tflops=rate)
    bench = Bench(args, machine)
    for case in args.cases:
        if time.perf_counter() - begun > args.time_limit:
            report.skip({"case": str(case)}, "time limit")
        else:
            report.attempt({"case": str(case)}, lambda case=case: bench.measure(case))
    print(table([cells(line) for line in report.lines], COLUMNS))


if __name__ == "__main__":
    main()

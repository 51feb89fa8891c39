"""Inference speed of the full-size model with random weights: s/image, images/s, TFLOP/s, share of the card, memory.

    python benchmarks/bench_inference.py                     # the table, on one GPU; needs no weights and no data
    python benchmarks/bench_inference.py --naive             # beside it, what the released code computes
    python benchmarks/bench_inference.py --cases dit/16/compiled edit/25/compiled@20 --time-limit 240
    python benchmarks/bench_inference.py --cases edit/1/compiled+offload --phases
    python benchmarks/bench_inference.py --tiny --steps 3    # a twin of a few hundred thousand values, on a CPU

A case is task/batch/mode, or task/batch/mode@steps. Tasks: subject, edit, subject_edit (whole calls at the official
steps and scales, encoding and decoding included) and dit (one forward pass of that many samples, 96 context positions;
no steps). Mode: "plain", "naive" (every step encodes again: all four picture slots, 256 positions, every branch; a few
steps are timed, the rest reckoned), or any of these joined by "+": compiled, offload, vae16, t5-8, t5-4 (bits), and,
approximate, reuse2 to reuse5. Modes that rebuild the pipeline
(offload, t5-8, t5-4) come last.

After an exact case of the same task, batch and steps, a case says how far it is off: `latent_error`, relative L2 of the
final latents, and `psnr` of the pictures in dB. Random weights make noise, not pictures: trained ones deviate
otherwise.

`peak_gib`: what whole calls, the first one and its captures included, took from the device ("call"); of a dit or a
naive case the steps alone ("denoise"). --phases makes one more call that waits between encode, denoise, decode and
to_pil: milliseconds of each, and its peak from an empty cache on.

FLOPs: branches x steps x DiT and the encoders once, as the exact computation needs them; the VAE is not counted, keys
and values of the context (1 % of the DiT) count at every step though "compiled" keeps them. The share is of the card's
bfloat16 matrix rate, measured first. A line of JSON a case, printed as it is measured; a case that fails says so and
the next one runs.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from mige import config
from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch
from mige.diffusion.settings import resolve
from mige.diffusion.solver import DPMSolver2M
from mige.inference.encoding import encode_references, encode_sources
from mige.inference.inputs import instruct
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise, make_sample
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.fast_dit import FastDenoiser
from mige.tasks import TASKS, Task
from mige.training.flops import forward_flops, measured_peak_flops
from mige.utils import images

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "example_data" / "images"
CONTEXT = 96  # positions in the dit cases
SLOTS = 4  # pictures the released code encodes for every sample
REBUILT = ("offload", "t5-8", "t5-4")  # options that change the pipeline for good
APPROXIMATE = {f"reuse{n}": {"reuse": n} for n in (2, 3, 4, 5)}
OPTIONS = ("plain", "naive", "compiled", "vae16", *REBUILT, *APPROXIMATE)
TABLE = "dit/16/compiled dit/48/compiled edit/1/compiled subject/5/compiled edit/25/compiled edit/1/compiled+offload"


@dataclass(frozen=True)
class Case:
    """What is measured, written "edit/25/compiled" or, with its own number of steps, "edit/25/compiled@20"."""

    task: str
    batch: int
    mode: str
    steps: int | None = None

    @classmethod
    def read(cls, text: str) -> "Case":
        try:
            name, at, steps = text.partition("@")
            task, batch, mode = name.split("/")
            case = cls(task, int(batch), mode, int(steps) if at else None)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not task/batch/mode or task/batch/mode@steps") from error
        if task not in ("dit", *Task) or not set(case.options) <= set(OPTIONS) or case.batch < 1:
            known = f"tasks dit, {', '.join(Task)}; modes {', '.join(OPTIONS)}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {known}")
        if case.steps is not None and (task == "dit" or case.steps < 1):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a step at least, and none in a dit case")
        return case

    @property
    def options(self) -> list[str]:
        return self.mode.split("+")

    @property
    def rebuilds(self) -> list[str]:
        """Its options that change the pipeline for good."""
        return sorted(set(self.options) & set(REBUILT))

    @property
    def name(self) -> str:
        """Without the steps, which a line has beside it."""
        return f"{self.task}/{self.batch}/{self.mode}"

    def __str__(self) -> str:
        return self.name if self.steps is None else f"{self.name}@{self.steps}"


# ---- the pipeline and its inputs -------------------------------------------------------------------------------------


class Words:
    """In place of a tokenizer, which would need a file: about as many tokens as T5's, of arbitrary ids."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = False) -> SimpleNamespace:
        pieces = [word[start : start + 5] for word in text.split() for start in range(0, len(word), 5)]
        return SimpleNamespace(input_ids=[3 + sum(piece.encode()) % 400 for piece in pieces])


def random_pipeline(args: argparse.Namespace) -> MIGEPipeline:
    """The parts with random weights, in the dtypes `from_pretrained` would give them."""
    sizes = config.load(args.config).model
    torch.manual_seed(0)
    parts = build_parts(sizes, device=args.device, dtype=getattr(torch, args.dtype))
    if args.dtype != "float32":
        set_product_dtype(parts["image_encoder"], getattr(torch, sizes.fusion["vision_dtype"]))
    pipeline = MIGEPipeline(**parts, tokenizer=Words(), scheduler=DPMSolver2M())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def samples(task: Task, batch: int) -> list[Sample]:
    """Prompts of different lengths, in turn."""
    cat, cup, coffee, flower = (
        images.open_image(PICTURES / f"{name}.jpg") for name in ("cat", "cup_on_black", "coffee", "flower_on_black")
    )
    rows = {
        Task.SUBJECT: [
            ("a<imagehere>next to a<imagehere>on a wooden table", [cat, cup], None),
            ("a<imagehere>in the jungle", [cat], None),
        ],
        Task.EDIT: [
            ("make the sky night in<imagehere>", [], cat),
            ("replace the cup on the table in<imagehere>with a glass of orange juice", [], coffee),
            ("remove the spoon from the picture", [], coffee),
        ],
        Task.SUBJECT_EDIT: [("replace the cup in<imagehere>with<imagehere>", [coffee, flower], coffee)],
    }[task]
    return [make_sample(*rows[n % len(rows)]) for n in range(batch)]


def draw(pipeline: MIGEPipeline, chosen: list[Sample]) -> list[SampleNoise]:
    size = pipeline.output_size(None, None)
    return [
        pipeline.draw_noise(sample.task, len(sample.references), torch.Generator().manual_seed(n), *size)
        for n, sample in enumerate(chosen)
    ]


# ---- what the released code computes ---------------------------------------------------------------------------------


def naive_denoiser(pipeline: MIGEPipeline, chosen: list[Sample], noise: list[SampleNoise]) -> Callable:
    """The released sampling loop's `denoise`: encodes all slots and the padded text again, runs every branch."""
    task, model = chosen[0].task, pipeline.model
    model.encoder.pad_to = pipeline.fusion.config.max_tokens
    inputs = pipeline.prepare(chosen, noise)
    unscaled = encode_references(pipeline.vae, inputs, pipeline._execution_device)
    source = encode_sources(pipeline.vae, inputs, unscaled)
    counts = [len(sample.references) for sample in chosen]
    used = [SLOTS * n + slot for n, count in enumerate(counts) for slot in range(count)]
    slots = [_slots(values, used, len(chosen)) for values in (inputs.vision_RCHW.to(unscaled.device), unscaled)]
    scale = TASKS[task].guidance
    branches = [Branch(1 - scale, True, False), Branch(scale, False, False)]
    if task is not Task.SUBJECT:
        branches = [Branch(0.0, True, True), *branches]

    def denoise(x_BCHW: Tensor, t: Tensor) -> Tensor:
        pictures = model.encoder.encode_images(slots[0], model.patchify(slots[1]))[used]
        embeds, mask = model.encoder.interleave(inputs.instructions, pictures)
        context = model.encoder.text_encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        stacked = guidance.stack(Condition(context, mask, source), branches, model.null_context.to(context))
        repeated = x_BCHW.repeat(len(branches), 1, 1, 1)
        output = model.denoise(repeated, t.expand(len(repeated)), stacked)
        return guidance.combine(output[:, : x_BCHW.shape[1]], branches)

    return denoise


def _slots(values_R: Tensor, used: list[int], batch: int) -> Tensor:
    """[R, ...] -> [4 x batch, ...], zeros in the empty slots."""
    every = values_R.new_zeros(SLOTS * batch, *values_R.shape[1:])
    every[used] = values_R
    return every


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """One pipeline, measured case by case."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.rate = measured_peak_flops(self.device)
        self.pipeline, self.changed = random_pipeline(args), []
        self.vae = copy.deepcopy(self.pipeline.vae).to("cpu")
        self.exact: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}  # latents, pixels by task, batch and steps

    def measure(self, case: Case) -> dict:
        self._prepare(case)
        if case.task == "dit":
            return self._dit(case)
        chosen = samples(Task(case.task), case.batch)
        return (self._naive if case.mode == "naive" else self._call)(case, chosen, draw(self.pipeline, chosen))

    def _prepare(self, case: Case) -> None:
        if case.rebuilds != self.changed:
            self.pipeline = None
            gc.collect()
            self.pipeline, self.changed = random_pipeline(self.args), case.rebuilds
            for option in reversed(case.rebuilds):  # bits before off-loading
                change = self.pipeline.offload_encoders if option == "offload" else self.pipeline.quantise_text_encoder
                change(self.device if option == "offload" else int(option[-1]))
        pipeline = self.pipeline
        pipeline.is_compiled = "compiled" in case.options
        pipeline._fast = None  # what an earlier case captured would count as this one's memory
        pipeline.vae = copy.deepcopy(self.vae).to(self.device)  # rounded weights would stay rounded
        if "vae16" in case.options:
            pipeline.vae_to_bfloat16()
        gc.collect()

    def _call(self, case: Case, chosen: list[Sample], noise: list[SampleNoise]) -> dict:
        steps, made = self._steps(case), None
        settings = {name: value for option in case.options for name, value in APPROXIMATE.get(option, {}).items()}

        def call() -> None:
            nonlocal made
            final = self.pipeline.run(chosen, noise, steps=steps, **settings)
            pixels = self.pipeline.decode(final)
            images.to_pil(pixels)  # arrives on the CPU, so the GPU has finished
            made = final, pixels

        self._reset_peak()  # here, because a timed call after it would be slower: it empties the cache
        first, *seconds = [self._seconds(call) for _ in range(1 + self.args.repeats)]
        line = self._line(case, chosen, steps, statistics.median(seconds)) | {"first_call_seconds": round(first, 2)}
        line |= self._deviation(case, steps, *(tensor.cpu() for tensor in made)) | {"peak_gib": {"call": self._peak()}}
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
        wanted, picture = self.exact[key]
        error = (pixels.clamp(-1, 1) - picture.clamp(-1, 1)).square().mean() / 4
        psnr = -10 * error.clamp(min=1e-12).log10()
        return {"latent_error": float(f"{((latents - wanted).norm() / wanted.norm()).item():.3g}"),
                "psnr": round(psnr.item(), 1)}  # fmt: skip

    def _phases(
        self, chosen: list[Sample], noise: list[SampleNoise], steps: int, settings: dict
    ) -> tuple[dict[str, float], dict[str, float | None]]:
        """Milliseconds and peak GiB of every phase of one more call, waiting between them."""
        pipeline, official = self.pipeline, guidance.Guidance(chosen[0].task)
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
                self._reset_peak()
                started = time.perf_counter()
                result = phase(result)
                self._wait()
                spent[name] = round(1000 * (time.perf_counter() - started), 1)
                peaks[name] = self._peak()
        return spent, peaks

    @torch.no_grad()
    def _naive(self, case: Case, chosen: list[Sample], noise: list[SampleNoise]) -> dict:
        pipeline, steps = self.pipeline, self._steps(case)
        denoise = naive_denoiser(pipeline, chosen, noise)
        start = torch.stack([n.latent for n in noise]).to(self.device)
        times = [torch.tensor(t, device=self.device) for t in (999.0, 500.0, 1.0)]
        denoise(start, times[0])
        self._reset_peak()
        a_step = statistics.median(self._seconds(lambda t=t: denoise(start, t)) for t in times)
        ends = self._seconds(lambda: naive_denoiser(pipeline, chosen, noise))
        ends += self._seconds(lambda: images.to_pil(pipeline.decode(start)))
        line = self._line(case, chosen, steps, steps * a_step + ends)
        return line | {"seconds_a_step": round(a_step, 4), "reckoned": True, "peak_gib": {"denoise": self._peak()}}

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
        self._reset_peak()
        repeats = 20 if self.on_gpu else 2
        seconds = self._seconds(lambda: [denoise(x, t) for _ in range(repeats)]) / repeats
        work = case.batch * self._flops(length, 0)["transformer"]
        line = {"case": case.name, "ms": round(1000 * seconds, 3), "ms_a_sample": round(1000 * seconds / case.batch, 3)}
        line |= {"tflop_a_sample": round(work / case.batch / 1e12, 3), **self._speed(work / seconds)}
        line["peak_gib"] = {"denoise": self._peak()}
        if self.args.profile:
            print_kernels(lambda: denoise(x, t), self.on_gpu)
        few = Condition(context[:2], None, source[:2])
        exact = self._forward(copy.deepcopy(transformer).float(), few, t, compiled=False)(x[:2], t)
        error = (self._forward(transformer, few, t, "compiled" in case.options)(x[:2], t) - exact).norm() / exact.norm()
        return line | {"error_to_float32": float(f"{error.item():.3g}")}

    def _forward(self, transformer: torch.nn.Module, condition: Condition, t: Tensor, compiled: bool) -> Callable:
        whole, timestep_dtype = [Branch(1.0, False, False)], self.pipeline.model.timestep_dtype
        if compiled:
            return FastDenoiser(transformer, timestep_dtype).start(condition, whole, t.reshape(1))
        model = copy.copy(self.pipeline.model)
        model._modules = {**model._modules, "transformer": transformer}
        return lambda x, t: model.denoise(x, t.expand(len(x)), condition)[:, :4].float()

    def _flops(self, context: int, pictures: int) -> dict[str, float]:
        cells = self.pipeline.transformer.config.sample_size // self.pipeline.transformer.config.patch_size
        return forward_flops(self.pipeline.model, cells**2, context, pictures)

    def _speed(self, flops_a_second: float) -> dict:
        share = round(flops_a_second / self.rate, 3) if self.rate else None
        return {"tflops": round(flops_a_second / 1e12, 3), "share": share}

    def _seconds(self, work: Callable) -> float:
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> float | None:
        """GiB taken from the device since the reset: a replayed graph's memory is reserved, never allocated."""
        return round(torch.cuda.max_memory_reserved() / 2**30, 2) if self.on_gpu else None


def print_kernels(work: Callable, on_gpu: bool, rows: int = 20) -> None:
    """The kernels (on a CPU the operators) that take the longest."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profiler:
        work()
        if on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
    for event in events[:rows]:
        print(f"{getattr(event, spent) / 1000:9.3f} ms {event.count:5d} x {event.key[:110]}")


# ---- the table -------------------------------------------------------------------------------------------------------

COLUMNS = ("case", "steps", "seconds_an_image", "images_a_second", "ms_a_sample", "tflops", "share", "call_gib",
           "denoise_gib", "latent_error", "psnr")  # fmt: skip


def table(lines: list[dict]) -> str:
    """The measured lines as Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for line in lines:
        peaks = {f"{phase}_gib": gib for phase, gib in line["peak_gib"].items()}
        cells = {**line, **peaks, "share": line["share"] and f"{line['share']:.1%}"}
        rows.append([str(cells[name]) if cells.get(name) is not None else "-" for name in COLUMNS])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", type=Case.read, default=[Case.read(case) for case in TABLE.split()])
    parser.add_argument("--naive", action="store_true", help="every case of a task in mode naive too")
    parser.add_argument("--tiny", action="store_true", help="configs/tiny.py")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--steps", type=int, help="of cases that name none; default: the official ones of the task")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after a first one; the median counts")
    parser.add_argument("--phases", action="store_true", help="one more call: time and memory of every phase")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a dit case's forward pass")
    parser.add_argument("--output", type=Path, help="file that the lines are appended to as well")
    args = parser.parse_args()
    args.config = args.config or ROOT / "configs" / ("tiny.py" if args.tiny else "mige_512.py")
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.naive:
        tasks = {(case.task, case.batch): None for case in args.cases if case.task != "dit"}
        args.cases += [Case(*key, "naive") for key in tasks]
    args.cases.sort(key=lambda case: case.rebuilds)  # a pipeline of each kind is built once, the untouched one first
    return args


def main() -> None:
    args, begun = parse(), time.perf_counter()

    def report(line: dict) -> dict:
        print(json.dumps(line), flush=True)
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line

    bench, lines = Bench(args), []
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else args.device
    rate = bench.rate and round(bench.rate / 1e12, 1)
    report({"device": name, "torch": torch.__version__, "dtype": args.dtype, "matrix_tflops": rate})
    for case in args.cases:
        if time.perf_counter() - begun > args.time_limit:
            report({"case": str(case), "skipped": "time limit"})
            continue
        try:
            lines.append(report(bench.measure(case)))
        except torch.OutOfMemoryError:
            report({"case": str(case), "failed": "out of memory"})
        except Exception as error:  # one case must not cost the others their time on the card
            report({"case": str(case), "failed": f"{type(error).__name__}: {error}"[:2000]})
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    print(table(lines))


if __name__ == "__main__":
    main()

"""Training speed of the full-size model with random weights on synthetic latents: samples/s, MFU, peak memory.

    python benchmarks/bench_training.py                      # the table, on one GPU; needs no weights and no data
    python benchmarks/bench_training.py --variants full/eager/fused full/compiled/stochastic/none --batches 12 --profile
    python benchmarks/bench_training.py --config configs/tiny.py --tokens 20 --batches 2 --steps 2   # on a CPU

One reference a sample. MFU is the useful work (no recomputation; the frozen vision tower forward only) over the card's
bfloat16 matrix rate, measured first. Every line splits a step by phase, as the GPU's clock sees it (`gpu_ms`, its idle
time included) and as the time the host takes to enqueue it (`host_ms`): where the host needs longer, it is the limit.
A variant that runs out of memory says so.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mige import config
from mige.checkpoints.lora import add_lora
from mige.config import TrainConfig
from mige.diffusion.gaussian import Diffusion
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.instruction import Instruction
from mige.models.mige import PARTS, MIGEModel
from mige.training.flops import forward_flops, measured_peak_flops, useful_flops
from mige.training.optimizers import build_optimizer

ROOT = Path(__file__).parent.parent
MODEL_PARTS = ("image_encoder", "qformer", "fusion", "text_encoder", "transformer")
CHECKPOINTED = {"none": [], "dit": ["transformer"], "t5": ["text_encoder"], "both": ["transformer", "text_encoder"]}
CHOICES = {
    "trainable": ("full", "text_encoder_frozen", "lora"),
    "blocks": ("eager", "compiled"),
    "optimizer": ("fused", "stochastic", "stochastic_clip", "torchao"),  # _clip: clips while it updates
    "checkpointed": tuple(CHECKPOINTED),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table, written "full/compiled/stochastic/dit"; what is left out at the end is as here."""

    trainable: str = "full"
    blocks: str = "compiled"
    optimizer: str = "stochastic"
    checkpointed: str = "dit"

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def __str__(self) -> str:
        return "/".join(dataclasses.astuple(self))


TABLE = [
    Variant("full", "eager", "fused"),
    Variant("full", "compiled", "fused"),
    Variant("full", "eager", "stochastic"),
    Variant("full", "compiled", "stochastic"),
    Variant("full", "compiled", "stochastic_clip"),
    Variant("full", "compiled", "stochastic", "both"),
    Variant("text_encoder_frozen", "compiled", "stochastic"),
    Variant("lora", "compiled", "fused"),
]


def make_optimizer(settings: TrainConfig, name: str, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    if name != "torchao":
        ours = "adamw" if name == "fused" else "adamw_bf16"
        chosen = dataclasses.replace(settings, optimizer=ours, param_dtype="bfloat16")
        return build_optimizer(chosen, parameters, parameters[0].device)
    from torchao.optim import _AdamW

    options = dict(betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay)
    return _AdamW(parameters, lr=settings.learning_rate, bf16_stochastic_round=True, **options)


class Clock:
    """Marks between the phases of a step, on the GPU's clock and on the host's."""

    def __init__(self, on_gpu: bool):
        self.on_gpu, self.marks = on_gpu, []

    def mark(self, ended: str) -> None:
        """`ended`: the phase before this mark."""
        event = None
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((ended, time.perf_counter(), event))

    def split(self, steps: int) -> dict[str, dict[str, float]]:
        """Mean milliseconds a step by phase; call when the GPU is done."""
        clocks = {"host_ms": lambda a, b: 1000 * (b[1] - a[1])}
        if self.on_gpu:
            clocks["gpu_ms"] = lambda a, b: a[2].elapsed_time(b[2])
        result = {}
        for name, between in clocks.items():
            phases = result[name] = {}
            for before, mark in itertools.pairwise(self.marks):
                if mark[0] != "start":
                    phases[mark[0]] = phases.get(mark[0], 0.0) + between(before, mark) / steps
            result[name] = {phase: round(ms, 1) for phase, ms in phases.items()}
        return result


class Bench:
    """One variant: model, optimiser and a batch, built once, stepped many times."""

    def __init__(self, args: argparse.Namespace, variant: Variant, batch: int):
        self.device, self.sizes, self.batch = torch.device(args.device), config.load(args.config), batch
        self.variant, self.on_gpu = variant, self.device.type == "cuda"
        torch.manual_seed(0)
        self.model = self._model()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        settings = dataclasses.replace(self.sizes.train, learning_rate=1e-6)
        self.optimizer = make_optimizer(settings, variant.optimizer, self.trained)
        self.diffusion = Diffusion()
        self.inputs = self._inputs(args.tokens)

    def _model(self) -> MIGEModel:
        variant, dtype = self.variant, torch.bfloat16 if self.on_gpu else torch.float32
        parts = build_parts(self.sizes.model, device=self.device, dtype=dtype, only=MODEL_PARTS)
        if self.on_gpu:
            set_product_dtype(parts["image_encoder"], getattr(torch, self.sizes.model.fusion["vision_dtype"]))
        model = MIGEModel(**parts)
        model.freeze(variant.trainable)
        if variant.trainable == "lora":
            add_lora(model.transformer, self.sizes.train.lora_rank)
        model.checkpoint_gradients(CHECKPOINTED[variant.checkpointed])
        if variant.blocks == "compiled" and self.on_gpu:
            torch._dynamo.reset()  # the blocks of the variant before count against the limit of recompilations
            model.compile_blocks(PARTS)
        return model.train()

    def _inputs(self, tokens: int) -> dict:
        """Instructions of exactly `tokens` positions with one picture, and random latents."""
        model, b, device = self.model, self.batch, self.device
        queries, cell = self.sizes.model.fusion["num_queries"], self.sizes.model.transformer["sample_size"]
        side = self.sizes.model.image_encoder["image_size"]
        words = torch.randint(3, 400, (b, tokens - queries - 3)).tolist()
        latents = [torch.randn(b, 4, cell, cell, device=device) for _ in range(4)]
        return dict(
            instructions=[Instruction(((5, 6), (*row, 1))) for row in words],
            vision=torch.randn(b, 3, side, side, device=device),
            x0=latents[0], noise=latents[1], references=latents[2], source=latents[3],
            t=torch.randint(1000, (b,), device=device), model=model,
        )  # fmt: skip

    def forward(self) -> Tensor:
        i = self.inputs
        x_t = self.diffusion.add_noise(i["x0"], i["noise"], i["t"])
        output = self.model(x_t, i["t"].float(), i["instructions"], i["vision"], i["references"], i["source"])
        return self.diffusion.loss(output, i["x0"], x_t, i["noise"], i["t"]).total.mean()

    def step(self, clock: Clock) -> None:
        clock.mark("start")
        loss = self.forward()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        scale = {}
        if self.variant.optimizer == "stochastic_clip":
            norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
            scale["scale"] = (0.01 / (norm + 1e-6)).clamp(max=1).float()
        else:
            nn.utils.clip_grad_norm_(self.trained, 0.01)
        clock.mark("clip")
        self.optimizer.step(**scale)
        self.optimizer.zero_grad()
        clock.mark("optimizer")


def measure(args: argparse.Namespace, variant: Variant, batch: int, rate: float | None) -> dict:
    """Mean seconds a step over `args.steps` after three warm-up steps."""
    started = time.perf_counter()
    bench = Bench(args, variant, batch)
    latent_tokens = (bench.sizes.model.transformer["sample_size"] // bench.model.transformer.config.patch_size) ** 2
    flops = useful_flops(forward_flops(bench.model, latent_tokens, args.tokens, pictures=1), variant.trainable)
    for _ in range(3):
        bench.step(Clock(bench.on_gpu))
    if bench.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    warm = time.perf_counter() - started
    started, clock = time.perf_counter(), Clock(bench.on_gpu)
    for _ in range(args.steps):
        bench.step(clock)
    if bench.on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if bench.on_gpu else None
    if args.profile:
        print_kernels(bench)
    return {"variant": str(variant), "batch": batch, "tokens": args.tokens, "seconds": round(seconds, 4),
            "samples_per_second": round(batch / seconds, 2), "tflop_a_sample": round(flops / 1e12, 3),
            "mfu": rate and round(batch / seconds * flops / rate, 3),
            "peak_gib": peak and round(peak, 1), "warm_up_seconds": round(warm, 1),
            **clock.split(args.steps)}  # fmt: skip


def print_kernels(bench: Bench, rows: int = 25) -> None:
    """The kernels (on a CPU the operators) that take the longest in one step."""
    kind = torch.profiler.ProfilerActivity.CUDA if bench.on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        bench.step(Clock(bench.on_gpu))
        if bench.on_gpu:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    events = [e for e in profiler.key_averages() if not getattr(e, "is_user_annotation", False)]
    events.sort(key=lambda e: -getattr(e, spent))
    total = sum(getattr(e, spent) for e in events)
    print(f"{total / 1000:9.2f} ms, {sum(e.count for e in events)} calls in one step of {bench.variant}")
    for e in events[:rows]:
        print(f"{getattr(e, spent) / 1000:9.2f} ms {getattr(e, spent) / total:6.1%} {e.count:6d} x {e.key[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    grammar = "; ".join(f"{name}: {', '.join(known)}" for name, known in CHOICES.items())
    parser.add_argument("--variants", nargs="+", type=lambda text: Variant(*text.split("/")), default=TABLE,
                        metavar="/".join(CHOICES), help=grammar)  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=256, help="positions of every instruction")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the longest")
    args = parser.parse_args()
    rate = measured_peak_flops(torch.device(args.device))
    print(json.dumps({"matrix_tflops": rate and round(rate / 1e12, 1)}), flush=True)
    for variant in args.variants:
        for batch in args.batches:
            try:
                print(json.dumps(measure(args, variant, batch, rate)), flush=True)
            except torch.OutOfMemoryError:
                print(json.dumps({"variant": str(variant), "batch": batch, "out_of_memory": True}), flush=True)
            gc.collect()
            if args.device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

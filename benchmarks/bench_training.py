"""Training speed of the full-size model with random weights on synthetic latents: samples/s, MFU, peak memory.

    python benchmarks/bench_training.py                      # the table, on one GPU; needs no weights and no data
    python benchmarks/bench_training.py --variants full/eager/fused full/compiled/stochastic/none --batches 12 --profile
    python benchmarks/bench_training.py --config configs/tiny.py --tokens 20 --batches 2 --steps 2   # on a CPU

One reference a sample. MFU is the useful work (no recomputation; the frozen vision tower forward only) over the card's
bfloat16 matrix rate, measured first. Medians over the steps. Every line splits a step by phase, as the GPU's clock sees
it (`gpu_ms`, its idle time included) and as the time the host takes to enqueue it (`host_ms`): where the host needs
longer, it is the limit. A variant that fails says so.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import ROOT, Machine, PhaseClock, Report, parser
from torch import Tensor, nn

from mige import config
from mige.checkpoints.lora import add_lora
from mige.config import TrainConfig
from mige.diffusion.gaussian import Diffusion
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.instruction import Instruction
from mige.models.mige import PARTS, MIGEModel
from mige.training.clipping import clip_factor, gradient_norm
from mige.training.flops import forward_flops, useful_flops
from mige.training.optimizers import build_optimizer

MODEL_PARTS = ("image_encoder", "qformer", "fusion", "text_encoder", "transformer")
CHECKPOINTED = {"none": [], "dit": ["transformer"], "t5": ["text_encoder"], "both": ["transformer", "text_encoder"]}
CHOICES = {
    "trainable": ("full", "text_encoder_frozen", "lora"),
    "blocks": ("eager", "compiled"),
    "optimizer": (
        "fused",
        "stochastic",
        "stochastic_clip",
        "torchao",
    ),  # _clip: as the trainer does
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
    if name.startswith("stochastic"):
        return build_optimizer(settings, parameters, parameters[0].device)
    options = dict(betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay)
    if name == "fused":  # what it learns on bfloat16 parameters is not asked here: the speed is
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, fused=True, **options)
    from torchao.optim import _AdamW

    return _AdamW(parameters, lr=settings.learning_rate, bf16_stochastic_round=True, **options)


class Bench:
    """One variant: model, optimiser and a batch, built once, stepped many times."""

    def __init__(self, args: argparse.Namespace, machine: Machine, variant: Variant, batch: int):
        self.device, self.on_gpu, self.sizes = machine.device, machine.on_gpu, config.load(args.config)
        self.variant, self.batch = variant, batch
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
        """Instructions of exactly `tokens` positions with one image, and random latents."""
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

    def step(self, clock: PhaseClock) -> None:
        clock.mark("start")
        loss = self.forward()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        if self.variant.optimizer == "stochastic_clip":
            self.optimizer.scale = clip_factor(gradient_norm(self.trained), 0.01)
        else:
            nn.utils.clip_grad_norm_(self.trained, 0.01)
        clock.mark("clip")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark("optimizer")


def measure(args: argparse.Namespace, machine: Machine, variant: Variant, batch: int) -> dict:
    """Medians of `args.steps` steps after three that do not count."""
    started = time.perf_counter()
    bench = Bench(args, machine, variant, batch)
    latent_tokens = (bench.sizes.model.transformer["sample_size"] // bench.model.transformer.config.patch_size) ** 2
    flops = useful_flops(forward_flops(bench.model, latent_tokens, args.tokens, images=1), variant.trainable)
    for _ in range(3):
        bench.step(PhaseClock(machine))
    machine.wait()
    warm = time.perf_counter() - started
    machine.reset_peak()
    clock = PhaseClock(machine)
    for _ in range(args.steps):
        bench.step(clock)
    medians = clock.medians()
    rate = batch / medians["seconds"]
    if args.profile:
        machine.print_kernels(lambda: bench.step(PhaseClock(machine)), f"one step of {variant}")
    return {"samples_per_second": round(rate, 2), "tflop_a_sample": round(flops / 1e12, 3),
            "mfu": machine.peak_flops and round(rate * flops / machine.peak_flops, 3),
            "peak_gib": machine.peak_gib(reserved=False), "warm_up_seconds": round(warm, 1), **medians}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    grammar = "; ".join(f"{name}: {', '.join(known)}" for name, known in CHOICES.items())
    made.add_argument("--variants", nargs="+", type=lambda text: Variant(*text.split("/")), default=TABLE,
                      metavar="/".join(CHOICES), help=grammar)  # fmt: skip
    made.add_argument("--batches", type=int, nargs="+", default=[16])
    made.add_argument("--tokens", type=int, default=256, help="positions of every instruction")
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--profile", action="store_true", help="print the kernels that take the longest")
    return made.parse_args(argv)


def main() -> None:
    args = parse()
    machine = Machine(args.device)
    report = Report(machine, args.output, matrix_tflops=machine.peak_flops and round(machine.peak_flops / 1e12, 1))
    for variant in args.variants:
        for batch in args.batches:
            case = {"variant": str(variant), "batch": batch, "tokens": args.tokens}
            report.attempt(case, lambda variant=variant, batch=batch: measure(args, machine, variant, batch))


if __name__ == "__main__":
    main()

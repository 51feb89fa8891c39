"""Training speed of the full-size model with random weights on synthetic latents: samples/s, MFU, peak memory.

    python benchmarks/bench_training.py                      # the table, on one GPU; needs no weights and no data
    python benchmarks/bench_training.py --config configs/tiny.py --tokens 20 --batches 2 --steps 2   # on a CPU

One reference a sample. MFU is the useful work (no recomputation; the frozen vision tower forward only) over the card's
bfloat16 matrix rate, measured first. A variant that runs out of memory says so.
"""

import argparse
import dataclasses
import gc
import json
import time
from pathlib import Path

import torch

from mige import config
from mige.diffusion import Diffusion
from mige.encoder import set_product_dtype
from mige.instruction import Instruction
from mige.lora import add_lora
from mige.model import MIGEModel
from mige.optimizers import build_optimizer
from mige.parts import build_parts
from mige.progress import forward_flops, matrix_rate, useful_flops

ROOT = Path(__file__).parent.parent
MODEL_PARTS = ("image_encoder", "qformer", "fusion", "text_encoder", "transformer")
VARIANTS = {  # name: (trainable, optimizer, compile, checkpointed parts)
    "full, eager": ("full", "adamw", False, ["transformer"]),
    "full": ("full", "adamw_bf16", True, ["transformer"]),
    "full, less memory": ("full", "adamw_bf16", True, ["transformer", "text_encoder"]),
    "text encoder frozen": ("text_encoder_frozen", "adamw_bf16", True, ["transformer"]),
    "lora": ("lora", "adamw", True, ["transformer"]),
}


class Bench:
    """One variant: model, optimiser and a batch, built once, stepped many times."""

    def __init__(self, args: argparse.Namespace, name: str, batch: int):
        trainable, optimizer, compiled, checkpointed = VARIANTS[name]
        self.device, self.sizes, self.batch = torch.device(args.device), config.load(args.config), batch
        on_gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        parts = build_parts(self.sizes.model, device=self.device, dtype=dtype, only=MODEL_PARTS)
        if on_gpu:
            set_product_dtype(parts["image_encoder"], getattr(torch, self.sizes.model.fusion["vision_dtype"]))
        self.model = MIGEModel(**parts)
        self.model.freeze(trainable)
        if trainable == "lora":
            add_lora(self.model.transformer, self.sizes.train.lora_rank)
        self.model.checkpoint_gradients(checkpointed)
        if compiled and on_gpu:
            self.model.compile_blocks()
        self.model.train()
        fields = dict(optimizer=optimizer if on_gpu else "adamw", weights="bfloat16", learning_rate=1e-6)
        self.optimizer = build_optimizer(dataclasses.replace(self.sizes.train, **fields), self.model.parameters())
        self.diffusion = Diffusion()
        self.inputs = self._inputs(args.tokens)

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

    def forward(self) -> torch.Tensor:
        i = self.inputs
        x_t = self.diffusion.add_noise(i["x0"], i["noise"], i["t"])
        output = self.model(x_t, i["t"].float(), i["instructions"], i["vision"], i["references"], i["source"])
        return self.diffusion.loss(output, i["x0"], x_t, i["noise"], i["t"]).total.mean()

    def step(self) -> None:
        self.forward().backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 0.01)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(args: argparse.Namespace, name: str, batch: int, rate: float | None) -> dict:
    """Mean seconds a step over `args.steps` after three warm-up steps."""
    on_gpu = args.device != "cpu"
    started = time.perf_counter()
    bench = Bench(args, name, batch)
    latent_tokens = (bench.sizes.model.transformer["sample_size"] // bench.model.transformer.config.patch_size) ** 2
    flops = useful_flops(forward_flops(bench.model, latent_tokens, args.tokens, pictures=1), VARIANTS[name][0])
    for _ in range(3):
        bench.step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    warm = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(args.steps):
        bench.step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / args.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"variant": name, "batch": batch, "tokens": args.tokens, "seconds": round(seconds, 4),
            "samples_per_second": round(batch / seconds, 2), "tflop_a_sample": round(flops / 1e12, 3),
            "mfu": rate and round(batch / seconds * flops / rate, 3),
            "peak_gib": peak and round(peak, 1), "warm_up_seconds": round(warm, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batches", type=int, nargs="+", default=[16])
    parser.add_argument("--tokens", type=int, default=256, help="positions of every instruction")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    rate = matrix_rate(torch.device(args.device))
    print(json.dumps({"matrix_tflops": rate and round(rate / 1e12, 1)}), flush=True)
    for name in args.variants:
        for batch in args.batches:
            try:
                print(json.dumps(measure(args, name, batch, rate)), flush=True)
            except torch.OutOfMemoryError:
                print(json.dumps({"variant": name, "batch": batch, "out_of_memory": True}), flush=True)
            gc.collect()
            if args.device != "cpu":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

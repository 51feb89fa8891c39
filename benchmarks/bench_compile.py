"""The DiT's guided step three ways: `FastDenoiser`, diffusers' `compile_repeated_blocks`, the whole compiled by torch.

    python benchmarks/bench_compile.py --mode fast --batch 1
    for mode in fast blocks whole; do for batch in 1 5 16 25; do
        python benchmarks/bench_compile.py --mode $mode --batch $batch --output compile.jsonl; done; done

A mode and a batch a process, so that no case finds what another has compiled. A line a prompt length, in the order that
--lengths gives: `first_seconds` of the first two steps, compiling included, then `ms` a step of two branches.
docs/notes/stock_options.md has the table.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from harness import ROOT, Machine, Report, digits, parser
from torch import Tensor

from mige import config
from mige.diffusion import guidance
from mige.diffusion.conditioning import Condition
from mige.diffusion.guidance import Branch
from mige.models.build import build_parts
from mige.models.fast_dit import FastDenoiser
from mige.tasks import Task

Step = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--mode", choices=["fast", "blocks", "whole", "eager"], default="fast", help="(%(default)s)")
    options.add_argument("--batch", type=int, default=1, help="samples; a step computes two branches of each")
    options.add_argument("--lengths", type=int, nargs="+", default=[96, 120, 60, 77, 96], help="(%(default)s)")
    options.add_argument("--steps", type=int, default=20, help="timed at a time (%(default)s)")
    options.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py", help="sizes")
    args = options.parse_args()
    machine = Machine(args.device)
    report = Report(machine, args.output, mode=args.mode, batch=args.batch)
    transformer = random_dit(args)
    for length in args.lengths:
        report.attempt({"length": length}, lambda: measure(args, machine, transformer, length))  # noqa: B023


def random_dit(args: argparse.Namespace) -> PixArtTransformer2DModel:
    """The DiT in bfloat16 with random weights, compiled as the mode says."""
    torch.manual_seed(0)
    sizes = config.load(args.config).model
    parts = build_parts(sizes, device=args.device, dtype=torch.bfloat16, only=("transformer",))
    transformer = parts["transformer"].requires_grad_(False)
    if args.mode == "blocks":
        transformer._repeated_blocks = ["BasicTransformerBlock"]  # diffusers names none for this class
        transformer.compile_repeated_blocks(fullgraph=True)
    elif args.mode == "whole":
        transformer.compile(mode="reduce-overhead", fullgraph=True)
    elif args.mode == "fast":
        transformer.fast = FastDenoiser(transformer, torch.float32)
    return transformer


@torch.no_grad()
def measure(args: argparse.Namespace, machine: Machine, transformer: PixArtTransformer2DModel, length: int) -> dict:
    side, chosen = transformer.config.sample_size, guidance.branches(Task.EDIT, 7.5, 1.0)
    condition = random_condition(args, transformer, length, chosen)
    x_BCHW = torch.randn(args.batch, 4, side, side, device=args.device)
    times_S = torch.linspace(999, 50, args.steps, device=args.device)
    machine.reset_peak()
    made: list[Step] = []

    def first() -> None:
        if args.mode == "fast":
            made.append(transformer.fast.start(condition, chosen, times_S))
        else:
            made.append(plain_step(transformer, condition, chosen))
        for time in times_S[:2]:
            made[0](x_BCHW, time)

    def steps() -> None:
        for time in times_S:
            made[0](x_BCHW, time)

    seconds = machine.seconds(first)
    ms = 1000 * machine.median_seconds(steps, repeats=3, warm_up=0) / args.steps
    return {"first_seconds": digits(seconds), "ms": digits(ms, 4), "peak_gib": machine.peak_gib(reserved=True)}


def random_condition(
    args: argparse.Namespace, transformer: PixArtTransformer2DModel, length: int, chosen: list[Branch]
) -> Condition:
    """Of both branches; every second sample's prompt fills half of the length."""
    width, side = transformer.config.caption_channels, transformer.config.sample_size
    make = {"device": args.device, "dtype": torch.bfloat16}
    mask_BL = torch.ones(args.batch, length, dtype=torch.long, device=args.device)
    mask_BL[1::2, length // 2 :] = 0
    context, source = torch.randn(args.batch, length, width, **make), torch.randn(args.batch, 4, side, side, **make)
    return guidance.stack(Condition(context, mask_BL, source), chosen, torch.randn(length, width, **make))


def plain_step(transformer: PixArtTransformer2DModel, condition: Condition, chosen: list[Branch]) -> Step:
    """Guided noise estimate through the library's forward pass, as `MIGEModel.denoise` calls it."""

    def step(x_BCHW: Tensor, time: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        latents = torch.cat([x_BCHW.repeat(len(chosen), 1, 1, 1), condition.source_BCHW.float()], dim=1)
        output = transformer(
            latents.to(transformer.dtype),
            encoder_hidden_states=condition.context_BLC,
            encoder_attention_mask=condition.mask_BL,
            timestep=time.expand(len(latents)).float(),
            return_dict=False,
        )[0]
        return guidance.combine(output[:, : x_BCHW.shape[1]], chosen)

    return step


if __name__ == "__main__":
    main()

"""Which model and in which mode: the options that infer.py, the page and `mige edit` share, and their pipeline."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mige.cli import command

if TYPE_CHECKING:
    import torch

    from mige.inference.pipeline import MIGEPipeline


def add(parser: argparse.ArgumentParser) -> None:
    """Where the model computes, in what dtype, how fast, in how little memory, with which adapters."""
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="the fast mode; the first image waits a little")
    parser.add_argument(
        "--offload", action="store_true", help="keep the encoders in host memory but while they compute"
    )
    parser.add_argument("--vae-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--t5-bits", type=int, choices=[8, 4], help="less memory: T5's matrices rounded")
    command.add_lora(parser)


def resolve(args: argparse.Namespace) -> None:
    """The device and dtype that nobody named, in `args`; ends the script where there is no such device."""
    args.device = command.check_device(command.parser(None), args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")


def label(args: argparse.Namespace, folder: Path) -> str:
    """What the model of a folder is called with the adapters that were asked for."""
    return " + ".join([folder.resolve().name, *(f"{Path(path).name}:{scale:g}" for path, scale in args.lora)])


def load(args: argparse.Namespace, folder: Path, device: "torch.device | str", *, verified: bool) -> "MIGEPipeline":
    """The pipeline of a checkpoint folder in the mode asked for; `verified`: as of `MIGEPipeline.from_pretrained`."""
    import torch

    from mige.inference.adapters import add_adapters
    from mige.inference.pipeline import MIGEPipeline

    pipeline = MIGEPipeline.from_pretrained(folder, dtype=getattr(torch, args.dtype), verified=verified)
    for path, scale in args.lora:
        add_adapters(pipeline, path, scale)
    if args.vae_dtype == "bfloat16":
        pipeline.vae_to_bfloat16()
    if args.t5_bits:
        pipeline.quantise_text_encoder(args.t5_bits)
    pipeline.offload_encoders(device) if args.offload else pipeline.to(device)
    if args.compile:
        pipeline.compile()
    return pipeline

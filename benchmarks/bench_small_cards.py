"""The smallest card for each way to take less memory: peak GiB, seconds of an edit, error of its latents.

    python benchmarks/bench_small_cards.py --output small_cards.jsonl     # full size, random weights, no file is needed
    python benchmarks/bench_small_cards.py --config configs/tiny.py --steps 2 --modes float32 bfloat16 int8 --device cpu

Every mode is a process of its own, which opens a folder of random weights as users do (`from_pretrained`, as released:
stored in bfloat16), makes an edit of the native square once to warm up and once to be timed, and ends after
`--seconds` at the latest. The error is the distance of the final latents from those of the float32 mode, as a share of
their norm. `peak_gib`: what PyTorch took from the card, loading included; `card_gib`: with what CUDA itself takes.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import PipelineQuantizationConfig
from harness import GIB, ROOT, Machine, Report, digits, parser, table
from random_model import samples, save_random

from mige.inference.pipeline import MIGEPipeline
from mige.tasks import Task
from mige.utils.files import append_json_lines

COLUMNS = ("mode", "card", "card_gib", "peak_gib", "seconds", "error", "load_seconds")
CARDS = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80)  # GiB that are sold
USABLE = 0.96  # of them: drivers and rounding take the rest
PARTS = ("transformer", "text_encoder")


def torchao(scheme: str) -> PipelineQuantizationConfig:
    """DiT and T5 with weights of 8 bits, "Int8WeightOnlyConfig" or "Float8WeightOnlyConfig"."""
    from torchao import quantization

    kind = getattr(quantization, scheme)
    made = {"transformer": diffusers.TorchAoConfig(kind()), "text_encoder": transformers.TorchAoConfig(kind())}
    return PipelineQuantizationConfig(quant_mapping=made)


def nf4() -> PipelineQuantizationConfig:
    """DiT and T5 in bitsandbytes' 4 bits; not T5's `wo`, of whose dtype it makes its activations."""
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    made = {"transformer": diffusers.BitsAndBytesConfig(**how),
            "text_encoder": transformers.BitsAndBytesConfig(**how, llm_int8_skip_modules=["wo"])}  # fmt: skip
    return PipelineQuantizationConfig(quant_mapping=made)


QUANTISERS = {
    "int8": lambda: torchao("Int8WeightOnlyConfig"),
    "float8": lambda: torchao("Float8WeightOnlyConfig"),
    "nf4": nf4,
}
AFTER: dict[str, Callable[[MIGEPipeline, torch.device], object]] = {
    "t5-8": lambda pipe, device: (pipe.quantise_text_encoder(8), pipe.to(device)),
    "t5-4": lambda pipe, device: (pipe.quantise_text_encoder(4), pipe.to(device)),
    "offload": lambda pipe, device: pipe.offload_encoders(device),
    "model_offload": lambda pipe, device: pipe.enable_model_cpu_offload(device=device),
    "group_offload": lambda pipe, device: pipe.enable_group_offload(
        device, torch.device("cpu"), offload_type="leaf_level", use_stream=device.type == "cuda"
    ),
}
MODES = ("float32", "bfloat16", "float16", *AFTER, *QUANTISERS)
"""float32 first: the others are compared with it. All but float32 and float16 compute in bfloat16."""


def open_in(mode: str, folder: Path, device: torch.device) -> MIGEPipeline:
    """The pipeline of a folder in a mode, on the device."""
    dtype = getattr(torch, mode) if mode in ("float32", "float16") else torch.bfloat16
    options = {"quantization_config": QUANTISERS[mode]()} if mode in QUANTISERS else {}
    pipeline = MIGEPipeline.from_pretrained(folder, dtype=dtype, verified=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    AFTER.get(mode, MIGEPipeline.to)(pipeline, device)
    return pipeline


def measure(mode: str, folder: Path, args: argparse.Namespace, machine: Machine) -> dict:
    """The line of a mode; the latents of float32 are left in the folder for the others."""
    machine.reset_peak()
    [sample] = samples(Task.EDIT, 1)
    started = time.perf_counter()
    pipeline = open_in(mode, folder, machine.device)
    machine.wait()
    loaded = time.perf_counter() - started

    def call() -> torch.Tensor:
        return pipeline(sample.prompt, source=sample.source, size="native", seed=0, num_inference_steps=args.steps,
                        output_type="latent").images  # fmt: skip

    latents: list[torch.Tensor] = []
    call()
    seconds = machine.seconds(lambda: latents.append(call()))
    pipeline(sample.prompt, source=sample.source, size="native", seed=0, num_inference_steps=1)  # decoding's memory
    [made], reference = (one.float().cpu() for one in latents), folder / "float32.pt"
    if mode == "float32":
        torch.save(made, reference)
    exact = torch.load(reference, weights_only=True)
    line = {"seconds": round(seconds, 2), "error": digits(((made - exact).norm() / exact.norm()).item()),
            "load_seconds": round(loaded, 1), "peak_gib": machine.peak_gib(reserved=True)}  # fmt: skip
    if machine.on_gpu:
        free, total = torch.cuda.mem_get_info(machine.device)
        outside = (total - free - torch.cuda.memory_reserved(machine.device)) / GIB
        line["card_gib"] = round(line["peak_gib"] + outside, 2)
        line["card"] = next((f"{card} GB" for card in CARDS if line["card_gib"] <= USABLE * card), "none")
    return line


def in_a_process(mode: str | None, folder: Path, args: argparse.Namespace) -> None:
    """What the process of a mode does: its line in a file of its own. None: makes the weights, which are shared."""
    machine = Machine(args.device)
    if mode is None:
        save_random(args.config, folder, machine.device, torch.bfloat16)
    else:
        report = Report(machine, folder / f"{mode}.jsonl")
        report.attempt({"mode": mode}, lambda: measure(mode, folder, args, machine))


def collect(mode: str, folder: Path, args: argparse.Namespace) -> dict:
    """The line of a mode whose process has ended, added to the output."""
    written = folder / f"{mode}.jsonl"
    machine, *found = map(json.loads, written.read_text().splitlines()) if written.exists() else [{}]
    line = found[0] if found else {"mode": mode, "failed": f"not finished after {args.seconds:g} s"}
    if args.output is not None:
        append_json_lines(args.output, [machine, line] if mode == args.modes[0] else [line])
    return line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py", help="sizes (%(default)s)")
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--steps", type=int, help="default: the official ones")
    made.add_argument("--seconds", type=float, default=45, help="after which a mode's process is ended")
    made.add_argument("--time-limit", type=float, default=200, help="seconds after which no mode is started any more")
    made.add_argument("--folder", type=Path, help="where the weights are written for the time being (13 GB)")
    args = made.parse_args(argv)
    if "float32" not in args.modes:
        made.error("--modes: float32 is what the others are compared with")
    args.modes.sort(key=MODES.index)
    return args


def main() -> None:
    args, started = parse(), time.monotonic()
    # Forks of a process that has the libraries imported and no GPU touched: this one has asked whether there is one.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["harness", "random_model", "mige.inference.pipeline"])
    folder = Path(tempfile.mkdtemp(prefix="mige-small-cards-", dir=args.folder))
    lines = []
    try:
        for mode in (None, *args.modes):
            if time.monotonic() - started > args.time_limit - 10:
                print(f"{mode}: not started, time limit", flush=True)
                continue
            child = forks.Process(target=in_a_process, args=(mode, folder, args))
            child.start()
            child.join(args.seconds)
            child.kill()
            child.join()
            if mode is not None:
                lines.append(collect(mode, folder, args))
    finally:
        shutil.rmtree(folder)
    print(table(lines, COLUMNS))


if __name__ == "__main__":
    main()

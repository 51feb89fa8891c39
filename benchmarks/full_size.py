"""Run the three tasks at full size with random weights: seconds a picture and peak memory. Needs no weights.

    python benchmarks/full_size.py --tokenizer output/pretrained_models/mige-tiny/tokenizer

On a CPU give --config configs/tiny.py --dtype float32.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

from mige import config
from mige.encoder import set_product_dtype
from mige.images import open_image
from mige.parts import build_parts
from mige.pipeline import MIGEPipeline
from mige.records import TASKS
from mige.sampler import DPMSolver2M

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "example_data" / "images"


def cases() -> dict[str, dict]:
    """One prompt a task, as keyword arguments of the pipeline."""
    cat, cup, coffee, flower = (
        open_image(PICTURES / f"{name}.jpg") for name in ("cat", "cup_on_black", "coffee", "flower_on_black")
    )
    return {
        "subject": dict(prompt="a<imagehere>next to a<imagehere>on a wooden table", references=[cat, cup]),
        "edit": dict(prompt="make the sky night in<imagehere>", references=[cat], source=cat),
        "subject_edit": dict(
            prompt="replace the cup in<imagehere>with<imagehere>", references=[coffee, flower], source=coffee
        ),
    }


def random_pipeline(args: argparse.Namespace) -> MIGEPipeline:
    """The parts with random weights, in the dtypes `from_pretrained` would give them."""
    sizes = config.load(args.config).model
    parts = build_parts(sizes, device=args.device, dtype=getattr(torch, args.dtype))
    if args.dtype != "float32":
        set_product_dtype(parts["image_encoder"], getattr(torch, sizes.fusion["vision_dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    return MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M())


def measure(pipeline: MIGEPipeline, name: str, case: dict, batch: int, repeats: int) -> dict:
    """Median seconds of whole calls (encoding, all steps, decoding) after one short warm-up, and peak memory."""
    on_gpu = pipeline._execution_device.type == "cuda"
    many = {key: [value] * batch for key, value in case.items()}
    pipeline(**many, num_inference_steps=2)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        pictures = pipeline(**many).images  # arrives on the CPU, so the GPU has finished
        seconds.append(time.perf_counter() - started)
    assert len(pictures) == batch
    median = sorted(seconds)[len(seconds) // 2]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return {"task": name, "batch": batch, "steps": TASKS[name].steps, "seconds": round(median, 3),
            "images_per_second": round(batch / median, 3), "peak_gib": round(peak, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "mige_512.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--offload", action="store_true", help="each part on the GPU only while it computes")
    args = parser.parse_args()
    pipeline = random_pipeline(args)
    pipeline.set_progress_bar_config(disable=True)
    if args.offload:
        pipeline.enable_model_cpu_offload(device=args.device)
    print(json.dumps({"device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu", **{
        name: round(sum(p.numel() for p in getattr(pipeline, name).parameters()) / 1e6, 1)
        for name in ("transformer", "text_encoder", "image_encoder", "qformer", "fusion", "vae")}}))  # fmt: skip
    for batch in args.batch:
        for name, case in cases().items():
            print(json.dumps(measure(pipeline, name, case, batch, args.repeats)), flush=True)


if __name__ == "__main__":
    main()

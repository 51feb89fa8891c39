"""Show the trained small model at work: a case of each of the world's sixteen tasks, and one of a fresh seed.

    python tools/demo.py
    python tools/demo.py --seed 7 --output output/demo_7

The prepared cases are the mini-bench's first about an unseen subject, whatever comes of them. Makes OUTPUT/index.html,
OUTPUT/contact_sheet.png, OUTPUT/results.jsonl and OUTPUT/images/.
"""

import argparse
import json
import secrets
import sys
import time
import timeit
from itertools import groupby
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from tqdm import tqdm

from mige.checkpoints.folder import CheckpointError
from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.cases import BenchCase, make_cases
from mige.data.synthetic.scenes import Scenes, draw
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench, bench_report
from mige.mini.bench_report import Card
from mige.reports.page import TASK_NAMES
from mige.utils import images
from mige.utils.files import write_text

MODEL = "output/pretrained_models/mige-mini"
GUIDANCE = 2.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="checkpoint folder (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder to make (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the fresh case (another one at every run)")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="of the weights (the faster one here)")
    args = parser.parse_args()
    args.seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if args.seed < 0 or args.steps < 1:
        parser.error(f"--seed is {args.seed}, --steps {args.steps}; expected >= 0 and >= 1")
    return args


def faster_dtype() -> str:
    """Whether this CPU multiplies matrices of the model's size sooner in bfloat16 or in float32."""

    def seconds(dtype: str) -> float:
        a, b = (torch.ones(size, dtype=getattr(torch, dtype)) for size in ((512, 384), (384, 1536)))
        return min(timeit.repeat(lambda: a @ b, number=1, repeat=10))

    return min(("bfloat16", "float32"), key=seconds)


def chosen(seed: int) -> list[BenchCase]:
    """The fresh case first, then the prepared ones."""
    fresh = tasks.sample(np.random.default_rng(seed), sprites.split()[1])
    prepared = [one for one in make_cases(2) if one.split == "unseen"]
    return [BenchCase(f"{fresh.kind}-fresh-{seed}", "unseen", seed, fresh), *prepared]


def answer(pipeline: MIGEPipeline, one: BenchCase, args: argparse.Namespace) -> Card:
    """Generate one picture, save it and measure it."""
    drawn = draw(Scenes.stack([one.case.target, *one.case.references]))
    pictures, number = images.to_pil(drawn)[1:], one.case.source
    started = time.perf_counter()
    made = pipeline(
        one.case.prompt,
        pictures,
        None if number is None else pictures[number],
        num_inference_steps=args.steps,
        guidance_scale=GUIDANCE,
        source_guidance_scale=1.0,
        seed=one.seed,
    ).images[0]
    seconds = time.perf_counter() - started
    path = args.output / "images" / f"{one.id}.png"
    images.save_image(made, path)
    source = None if number is None else drawn[1 + number]
    [scores] = bench.measure(one.case, images.to_pixels(made)[None], drawn[0], source)
    return Card(one, path, scores, f"{seconds:.1f} s")


def main() -> None:
    args = parse()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    dtype = args.dtype or faster_dtype()
    print(f"{dtype} weights; the fresh case has --seed {args.seed}")
    pipeline = MIGEPipeline.from_pretrained(args.model, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    cards = [answer(pipeline, one, args) for one in tqdm(chosen(args.seed), unit="picture")]
    rows = [{"id": c.one.id, "prompt": c.one.case.prompt, "scores": c.scores, "seconds": c.remark} for c in cards]
    write_text(args.output / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pages(cards, args, dtype)


def pages(cards: list[Card], args: argparse.Namespace, dtype: str) -> None:
    note = (f"{args.model}, {args.steps} steps, guidance {GUIDANCE:g}, {dtype}. The subjects of the references "
            f"were never shown in training. The first case is drawn from seed {args.seed}.")  # fmt: skip
    groups = [("A fresh case", cards[:1])]
    groups += [(TASK_NAMES[task], list(same)) for task, same in groupby(cards[1:], lambda card: card.one.case.task)]
    sections = [bench_report.section(name, len(same), [("", same)], args.output, f"task-{n}")
                for n, (name, same) in enumerate(groups, start=1)]  # fmt: skip
    page = args.output / "index.html"
    bench_report.page(page, "MIGE-mini", [name for name, _ in groups], sections, note=note)
    sheet = bench_report.sheet(cards, args.output / "contact_sheet.png", note=note)
    print(f"{len(cards)} pictures: open {page} or {sheet}")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")

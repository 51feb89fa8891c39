"""The trained small model at work: which cases it is shown on, and the pages that show them."""

import time
import timeit
from argparse import Namespace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.cases import BenchCase, make_cases
from mige.data.synthetic.scenes import Scenes, draw
from mige.diffusion.settings import WORLD, resolve
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench_report
from mige.mini.bench_measures import measure
from mige.mini.bench_report import Card
from mige.reports.cases import TASK_NAMES
from mige.reports.page import write_page
from mige.reports.sheet import contact_sheet
from mige.utils import images


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


def load(args: Namespace, dtype: torch.dtype) -> list[MIGEPipeline]:
    """The teacher and its student, if `args.student` names one: a model folder, or adapters for the teacher."""
    teacher = MIGEPipeline.from_pretrained(args.model, dtype=dtype)
    pipelines = [teacher]
    if args.student:
        is_lora = (Path(args.student) / "adapter_config.json").is_file()
        student = MIGEPipeline.from_pretrained(args.model if is_lora else args.student, dtype=dtype)
        if is_lora:
            student.load_lora_weights(args.student)
        pipelines.append(student)
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        if dtype is torch.bfloat16:
            pipeline.vae_to_bfloat16()  # with few steps a fifth of the time is the VAE's
    return pipelines


def answer(pipeline: MIGEPipeline, one: BenchCase, args: Namespace) -> Card:
    """Generate one image, save it and measure it. A few-step student has its own steps, any other `args.steps`."""
    is_student = "num_inference_steps" in pipeline.scheduler.config
    how = resolve(pipeline.scheduler.config, one.case.task, None if is_student else args.steps, usual=WORLD)
    drawn = draw(Scenes.stack([one.case.target, *one.case.references]))
    references, number = images.to_pil(drawn)[1:], one.case.source
    for n, reference in enumerate(references, start=1):
        images.save_image(reference, args.output / "inputs" / f"{one.id}-{n}.png")
    started = time.perf_counter()
    made = pipeline(
        one.case.prompt,
        references,
        None if number is None else references[number],
        num_inference_steps=how.steps,
        guidance_scale=how.guidance,
        source_guidance_scale=how.source_guidance,
        seed=one.seed,
    ).images[0]
    seconds = time.perf_counter() - started
    path = args.output / "images" / f"{one.id}{'-student' if is_student else ''}.png"
    images.save_image(made, path)
    source = None if number is None else drawn[1 + number]
    [scores] = measure(one.case, images.to_pixels(made)[None], drawn[0], source)
    steps = f"student, {how.steps} step{'s' * (how.steps > 1)}" if is_student else f"{how.steps} steps"
    return Card(one, path, scores, f"{steps}, {seconds:.1f} s")


def pages(cards: list[Card], args: Namespace, dtype: str) -> None:
    """The page and the contact sheet of cards in the order of `chosen`, a student's after its teacher's."""
    beside = f", beside it its few-step student {args.student}" if args.student else ""
    note = (f"{args.model}{beside}, {dtype}. The subjects of the references were never shown in training. The first "
            f"case is drawn from seed {args.seed}.")  # fmt: skip
    fresh = 2 if args.student else 1
    groups = [("A fresh case", cards[:fresh])]
    groups += [(TASK_NAMES[task], list(same)) for task, same in groupby(cards[fresh:], lambda card: card.one.case.task)]
    draw = bench_report.drawing(args.output)
    sections = [bench_report.section(name, len(same), [("", same)], draw) for name, same in groups]
    page = write_page(args.output / "index.html", "MIGE-mini", sections, note=note)
    sheet, *_ = contact_sheet([card.case() for card in cards], args.output / "contact_sheet.png", note=note, tile=160)
    print(f"{len(cards)} images: open {page} or {sheet}")

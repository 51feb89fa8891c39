"""What distilling the full-size model costs on one GPU: samples/s, GiB, hours for its recipe; random weights.

    python benchmarks/bench_distill.py --output distill.jsonl       # some 3 minutes on an H100; needs no weights
    python benchmarks/bench_distill.py --config configs/tiny.py --batch 2 --tokens 20 --device cpu

The trainer of train_scripts/distill.py takes steps on samples made in memory: edits of one reference, with moments as
from a latent store, all prompts of one length. Cases: "whole" trains the DiT, "lora" adapters of it; each "eager", or
with the DiT's blocks "compiled". The encoder is frozen. A line of JSON a case: seconds a micro-batch, the part of it
that the teacher takes, and the hours of the config's steps.
"""

import argparse
import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState
from harness import ROOT, Machine, Report, ending_after, parser, table
from torch.utils.data import Dataset

from mige import config
from mige.config import Config, DistillationConfig
from mige.data.batch import TrainingBatch, TrainingSample, collate
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.instruction import Instruction
from mige.models.vae import Moments
from mige.tasks import Task
from mige.training import trainer
from mige.training.distillation import DistillationTrainer

CASES = ("whole/eager", "lora/eager", "lora/compiled", "whole/compiled")
COLUMNS = (
    "case",
    "samples_a_second",
    "seconds",
    "teacher_seconds",
    "peak_gib",
    "batch",
    "recipe_samples",
    "recipe_hours",
)


class Edits(Dataset):
    """What is trained on is given by hand; the trainer asks for no more than a data set's length."""

    def __len__(self) -> int:
        return 100_000

    def epochs(self, samples: int) -> float:
        return samples / len(self)


def batch_of(settings: Config, pipeline: MIGEPipeline, many: int, tokens: int) -> TrainingBatch:
    """So many edits whose contexts have so many positions."""
    shape, side = (
        pipeline.latent_shape(settings.data.size, settings.data.size),
        pipeline.image_encoder.config.image_size,
    )
    words = tuple(range(3, tokens - pipeline.fusion.config.num_queries))
    rows = []
    for number in range(many):
        generator = sample_generator(0, number)
        chance = sample_randomness(generator, 2, shape, Dropout(0.0, 0.0, 0.0), settings.train.noise_levels, 1000)
        mean, std = torch.randn(2, 2, *shape, generator=generator)
        vision = torch.randn(1, 3, side, side, generator=generator)
        instruction, name = Instruction(((5, 6), (*words, 1))), str(number)
        rows.append(
            TrainingSample(name, name, Task.EDIT, 0, instruction, vision, None, Moments(mean, std.abs()), **chance)
        )
    return collate(rows)


class Bench:
    """One set of random parts, of whose DiT every case trains a copy."""

    def __init__(self, args: argparse.Namespace, machine: Machine):
        self.args, self.machine = args, machine
        torch.manual_seed(0)
        recipe = config.load(args.config)
        dtype = torch.bfloat16 if machine.on_gpu else torch.float32
        self.parts = build_parts(recipe.model, device=machine.device, dtype=dtype)
        if machine.on_gpu:
            set_product_dtype(self.parts["image_encoder"], getattr(torch, recipe.model.fusion["vision_dtype"]))

    def _pipeline(self, *_: object) -> MIGEPipeline:
        own = {"transformer": copy.deepcopy(self.parts["transformer"]), "scheduler": DPMSolver2M(), "tokenizer": None}
        return MIGEPipeline(**(self.parts | own))

    def measure(self, case: str) -> dict:
        """The line of a case."""
        recipe = self._recipe(*case.split("/"))
        AcceleratorState._reset_state(reset_partial_state=True)  # each case has its own precision
        instead = {"load_pretrained": self._pipeline, "load_dataset": lambda *_: Edits()}
        instead["frozen_digest"] = lambda *_: ""  # there is no tokenizer, and nothing is resumed
        with tempfile.TemporaryDirectory() as folder, patch.multiple(trainer, **instead):
            student = DistillationTrainer(recipe, Path(folder) / "run")
            batch = batch_of(recipe, student.pipeline, self.args.batch, self.args.tokens)
            line = self._steps(student, itertools.repeat(batch))
        own = config.load(self.args.config).train
        samples = own.steps * own.batch_size * own.gradient_accumulation_steps
        rate = self.args.batch / line["seconds"]
        line |= {"batch": self.args.batch, "recipe_samples": samples, "precision": student.config.train.precision}
        return line | {"samples_a_second": round(rate, 2), "recipe_hours": round(samples / rate / 3600, 2)}

    def _recipe(self, trainable: str, how: str) -> Config:
        """The config's own, of one micro-batch a step."""
        parts = ["transformer"] if how == "compiled" else []
        changes = ["train.gradient_accumulation_steps=1", f"train.batch_size={self.args.batch}", "train.ema=None",
                   "train.optimizer=adamw", f"train.compile={parts}", "train.sample_every=0", "train.trackers=[]",
                   "data.drop_text=0.0", "data.drop_source=0.0", "data.drop_both=0.0"]  # fmt: skip
        changes.append(f"train.precision={'bfloat16' if self.machine.on_gpu else 'float32'}")
        changes.append(f"train.trainable={'dit' if trainable == 'whole' else 'lora'}")
        recipe = config.load(self.args.config, changes)
        if recipe.distillation is None:
            recipe = dataclasses.replace(recipe, distillation=DistillationConfig(4, 20, 5.0, 1.0))
        return recipe

    def _steps(self, student: DistillationTrainer, batches: itertools.repeat) -> dict:
        def step() -> None:
            student._train_step(batches)
            student.monitor.flush()

        first = self.machine.seconds(step)
        step()
        self.machine.reset_peak()
        seconds = [self.machine.seconds(step) for _ in range(self.args.steps)]
        peak, path, spent = self.machine.peak_gib(reserved=False), student.objective._path, []

        def timed(*given: object) -> list:
            made = []
            spent.append(self.machine.seconds(lambda: made.append(path(*given))))
            return made[0]

        student.objective._path = timed
        step()
        line = {"first_step_seconds": round(first, 1), "seconds": round(median(seconds), 3), "peak_gib": peak}
        return line | {"teacher_seconds": round(spent[0], 3)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "distill_512.py")
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES[:3]))
    made.add_argument("--batch", type=int, default=16, help="samples a micro-batch (%(default)s)")
    made.add_argument("--tokens", type=int, default=96, help="positions of a context (%(default)s)")
    made.add_argument("--steps", type=int, default=3, help="timed, after two that are not")
    made.add_argument("--time-limit", type=float, default=200, help="seconds after which it ends, whatever it is at")
    return made.parse_args(argv)


def main() -> None:
    args, begun = parse(), time.perf_counter()
    with ending_after(args.time_limit):
        measure(args, begun)


def measure(args: argparse.Namespace, begun: float) -> None:
    machine = Machine(args.device)
    report = Report(machine, args.output, weights="random", config=args.config.name)
    bench = Bench(args, machine)
    print(f"built in {time.perf_counter() - begun:.0f} s", flush=True)
    for case in args.cases:
        report.attempt({"case": case}, lambda case=case: bench.measure(case))
    AcceleratorState._reset_state(reset_partial_state=True)
    print(table(report.lines, COLUMNS))


if __name__ == "__main__":
    main()

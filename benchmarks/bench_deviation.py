"""How far every faster mode is from the 1000-step result, on a trained model: latents, pictures, verdicts.

    python benchmarks/bench_deviation.py output/pretrained_models/mige-mini --output deviation.jsonl
    python benchmarks/bench_deviation.py MODEL --per-kind 2 --kinds add two_references --reference-steps 100   # a CPU

Random weights make noise, so what bench_inference.py measures of speed is joined here with cases of the mini-bench
(`mige.mini.bench`), half of them about unseen subjects. The reference is the exact mode ("compiled") in float32; every
setting starts from the same noise. A setting is mode/steps, the modes as bench_inference.py writes them; beside
those, "bfloat16": the model in that precision, as the full-size model runs.

A line of JSON a setting. `latent_error`: relative L2 of the final latents, median over cases, and its 95th percentile.
`psnr`: of the pictures, mean over cases in dB, with its 95 % interval; 120 is the same picture. `success`,
`identity`, `background`: shares of the mini-bench, of the cases that it asks for them; `same_verdict`: share of cases
whose every verdict is that of the reference.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_inference import APPROXIMATE
from torch import Tensor

from mige.checkpoints.folder import CheckpointError
from mige.data.synthetic import tasks
from mige.data.synthetic.cases import BenchCase, make_cases
from mige.data.synthetic.scenes import SIDE, Scenes, draw
from mige.evaluation.statistics import t_interval
from mige.inference.pipeline import MIGEPipeline
from mige.inference.samples import Sample, SampleNoise, make_sample
from mige.mini import bench
from mige.tasks import Task
from mige.utils import images

GUIDANCE = {"text_guidance": 2.0, "source_guidance": 1.0}  # the mini-bench's
VERDICTS = ("success", "identity", "background")
OPTIONS = ("plain", "compiled", "bfloat16", "vae16", *APPROXIMATE)
TABLE = (
    "compiled/1000 compiled/60 compiled/30 compiled/20 compiled/10 compiled+vae16/60 compiled+reuse2/60 "
    "compiled+reuse3/60 compiled+reuse4/60 compiled+reuse5/60 "
    "compiled+bfloat16/60"
)


@dataclass(frozen=True)
class Setting:
    """What is compared, written "compiled+reuse2/60"."""

    mode: str
    steps: int

    @classmethod
    def read(cls, text: str) -> "Setting":
        try:
            mode, steps = text.split("/")
            setting = cls(mode, int(steps))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not mode/steps") from error
        if not setting.options <= set(OPTIONS) or setting.steps < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: expected at least a step and modes of {', '.join(OPTIONS)}")
        return setting

    @property
    def options(self) -> set[str]:
        return set(self.mode.split("+"))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if "bfloat16" in self.options else torch.float32


@dataclass(frozen=True)
class Made:
    """What a setting makes of all cases, on the CPU."""

    latents: Tensor  # [N, 4, h, w]
    pixels: Tensor  # [N, 3, H, W], in [-1, 1]


# ---- generating ------------------------------------------------------------------------------------------------------


class Maker:
    """The model in the precisions that are asked for, and the cases in batches of one task."""

    def __init__(self, args: argparse.Namespace):
        self.folder, self.device = args.model, torch.device(args.device)
        self.pipelines: dict[torch.dtype, MIGEPipeline] = {}
        cases = make_cases(args.per_kind, kinds=args.kinds)
        by_task = [[one for one in cases if one.case.task is task] for task in Task]
        batches = [same[n : n + args.batch] for same in by_task for n in range(0, len(same), args.batch)]
        self.cases = [one for batch in batches for one in batch]
        exact = self._pipeline(torch.float32)
        self.inputs = [inputs(exact, batch) for batch in batches]
        self.vae = copy.deepcopy(exact.vae)  # float32 in either precision

    @torch.no_grad()
    def make(self, setting: Setting) -> Made:
        pipeline = self._pipeline(setting.dtype)
        changes = {name: value for option in setting.options for name, value in APPROXIMATE.get(option, {}).items()}
        pipeline.is_compiled = "compiled" in setting.options
        pipeline._fast, pipeline.vae = None, copy.deepcopy(self.vae)  # rounded weights would stay rounded
        if "vae16" in setting.options:
            pipeline.vae_to_bfloat16()
        made = []
        for samples, noise in self.inputs:
            latents = pipeline.run(samples, noise, steps=setting.steps, **GUIDANCE, **changes)
            made.append((latents.cpu(), pipeline.decode(latents).clamp(-1, 1).cpu()))
        return Made(*(torch.cat(parts) for parts in zip(*made, strict=True)))

    def _pipeline(self, dtype: torch.dtype) -> MIGEPipeline:
        if dtype not in self.pipelines:
            pipeline = MIGEPipeline.from_pretrained(self.folder, dtype=dtype).to(self.device)
            pipeline.set_progress_bar_config(disable=True)
            self.pipelines[dtype] = pipeline
        return self.pipelines[dtype]


def inputs(pipeline: MIGEPipeline, batch: Sequence[BenchCase]) -> tuple[list[Sample], list[SampleNoise]]:
    """Prompts, pictures and noise of cases, as the mini-bench gives them."""
    samples = []
    for one in batch:
        pictures = images.to_pil(draw(Scenes.stack(one.case.references))) if one.case.references else []
        source = None if one.case.source is None else pictures[one.case.source]
        samples.append(make_sample(one.case.prompt, pictures, source))
    noise = [
        pipeline.draw_noise(s.task, len(s.references), torch.Generator().manual_seed(one.seed), SIDE, SIDE)
        for s, one in zip(samples, batch, strict=True)
    ]
    return samples, noise


# ---- comparing -------------------------------------------------------------------------------------------------------


def latent_errors(latents: Tensor, wanted: Tensor) -> Tensor:
    """Relative L2 of every case, [N]."""
    return (latents - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)


def psnrs(pixels: Tensor, wanted: Tensor) -> Tensor:
    """PSNR of every case in dB, [N], of pictures in [-1, 1]; at most 120."""
    error = ((pixels - wanted) / 2).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-12).log10()


def verdicts(cases: Sequence[BenchCase], every: Sequence[Made], device: torch.device) -> list[list[dict]]:
    """For every case what the mini-bench finds right (1) and wrong (0) in the picture of each of M settings."""
    found = []
    for n, one in enumerate(cases):
        target, *references = draw(Scenes.stack([one.case.target, *one.case.references]), device)
        source = None if one.case.source is None else references[one.case.source]
        outputs = torch.stack([made.pixels[n] for made in every]).to(device)
        scores = bench.measure(one.case, outputs, target, source)
        found.append([{name: s[name] for name in VERDICTS if name in s} for s in scores])
    return found


def compare(made: Made, reference: Made) -> dict:
    errors, psnr = latent_errors(made.latents, reference.latents), psnrs(made.pixels, reference.pixels)
    return {
        "latent_error": digits(errors.median()),
        "latent_error_95": digits(errors.quantile(0.95)),
        "psnr": round(psnr.mean().item(), 2),
        "psnr_interval": [None if end is None else round(end, 2) for end in t_interval(psnr.tolist())],
    }


def judge(found: Sequence[dict], wanted: Sequence[dict]) -> dict:
    """Verdicts of one setting, a case each, and those of the reference -> shares."""
    same = [one == other for one, other in zip(found, wanted, strict=True)]
    values = {name: [one[name] for one in found if name in one] for name in VERDICTS}
    shares = {name: round(sum(some) / len(some), 4) for name, some in values.items() if some}
    return {"same_verdict": round(sum(same) / len(same), 4), **shares}


def digits(value: Tensor) -> float:
    return float(f"{value.item():.3g}")


# ---- the run ---------------------------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder of a model trained on the miniature world")
    parser.add_argument("--settings", nargs="+", type=Setting.read, default=[*map(Setting.read, TABLE.split())])
    parser.add_argument("--reference-steps", type=int, default=1000, help="of the reference (%(default)s)")
    parser.add_argument("--per-kind", type=int, default=4, help="cases of each kind, even (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=tasks.KINDS, default=list(tasks.KINDS), metavar="KIND",
                        help=f"of task (all): {', '.join(tasks.KINDS)}")  # fmt: skip
    parser.add_argument("--batch", type=int, default=64, help="cases at a time (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--output", type=Path, help="file that the lines are appended to as well")
    args = parser.parse_args()
    if args.batch < 1 or args.reference_steps < 1 or args.per_kind < 2 or args.per_kind % 2:
        parser.error(f"--batch is {args.batch}, --reference-steps {args.reference_steps}, --per-kind {args.per_kind}; "
                     "expected >= 1, >= 1 and an even number >= 2")  # fmt: skip
    return args


def main() -> None:
    args = parse()
    maker, on_gpu = Maker(args), args.device.startswith("cuda")
    name = torch.cuda.get_device_name(args.device) if on_gpu else args.device
    facts = {"model": Path(args.model).name, "cases": len(maker.cases), "reference_steps": args.reference_steps}
    facts |= {"device": name, "torch": torch.__version__}
    exact, made, failed = Setting("compiled", args.reference_steps), {}, {}
    for setting in dict.fromkeys([exact, *args.settings]):
        begun = time.perf_counter()
        try:
            made[setting] = maker.make(setting)
        except Exception as error:  # one setting must not cost the others their time on the card
            if setting == exact:
                raise
            failed[setting] = f"{type(error).__name__}: {error}"[:2000]
        print(f"{setting.mode}/{setting.steps}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    found = dict(zip(made, zip(*verdicts(maker.cases, list(made.values()), maker.device), strict=True), strict=True))
    for setting in args.settings:
        line = {"mode": setting.mode, "steps": setting.steps, "dtype": str(setting.dtype).removeprefix("torch.")}
        if setting in made:
            line |= {**compare(made[setting], made[exact]), **judge(found[setting], found[exact])}
        else:
            line["failed"] = failed[setting]
        print(json.dumps(line | facts), flush=True)
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line | facts) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")

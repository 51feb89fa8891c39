"""Do the three kinds of AdamW learn alike: float32 masters ("mixed"), bfloat16 with stochastic rounding, 8-bit moments?

    python benchmarks/bench_precision.py OUT tune --cards 0 1 2
    python benchmarks/bench_precision.py OUT final --cards 0 1 2 --rates mixed=8e-4 bfloat16=8e-4 adamw_8bit=8e-4

Every run is train_scripts/train_mige.py with configs/ablation.py and AdamW, from one start, all of them at the same
time, dealt to the cards. `tune` tries rates on another seed than those compared; the least held-out loss wins. `final`
trains each kind from the same seeds at its rate and scores its last weights on mini-bench. OUT/held_out.jsonl has the
held-out loss of every checkpoint, OUT/scores.jsonl every case; stdout has the comparison.

"Not worse than float32 masters" was named before the runs: at the end, with its 95 % interval over cases and seeds,
identity and success less than .05 below, L1 inside less than .003 above; held-out loss less than 1 % above.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, digits, table

from mige import config
from mige.data.synthetic.cases import make_cases
from mige.evaluation.statistics import estimate
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench
from mige.mini.ablation_scores import score_lines
from mige.mini.bench_measures import SHARES
from mige.mini.start import start_with
from mige.utils.files import append_json_lines, read_json_lines

KINDS = {
    "mixed": ("train.optimizer=adamw", "train.precision=mixed"),
    "bfloat16": ("train.optimizer=adamw", "train.precision=bfloat16"),
    "adamw_8bit": ("train.optimizer=adamw_8bit", "train.precision=mixed"),
}
BOUNDS = {"identity": 0.05, "success": 0.05, "l1_inside": 0.003}
TUNING_SEED = 100


@dataclass(frozen=True)
class Run:
    """One training: what, from which seed, at which rate, and where it lies."""

    kind: str
    seed: int
    rate: float
    folder: Path


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path)
    made.add_argument("what", choices=["tune", "final"])
    made.add_argument("--cards", type=int, nargs="+", default=[0], help="numbers of GPUs; on a CPU it does not matter")
    made.add_argument("--rates", nargs="+", required=True, help="tune: numbers for all; final: KIND=RATE of each")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the final runs (%(default)s)")
    made.add_argument("--steps", type=int, default=2800)
    made.add_argument("--config", type=Path, default=ROOT / "configs" / "ablation.py")
    made.add_argument("--from-model", type=Path, default=ROOT / "output" / "pretrained_models" / "ablation-base")
    made.add_argument("--held-out", type=int, default=384, help="cases of it (%(default)s)")
    made.add_argument("--per-kind", type=int, default=104, help="cases of each kind, scored (%(default)s)")
    made.add_argument("--seconds", type=float, default=540, help="trainings still at work by then are ended")
    made.add_argument("--set", nargs="*", default=[], help="more overrides of the config")
    return made.parse_args()


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs, those of one kind apart, so that every card gets some of each."""
    runs = args.out / "runs"
    if args.what == "tune":
        return [Run(kind, TUNING_SEED, float(rate), runs / f"{kind}-{rate}")
                for rate, kind in itertools.product(args.rates, KINDS)]  # fmt: skip
    rates = dict(text.split("=") for text in args.rates)
    return [Run(kind, seed, float(rates[kind]), runs / f"{kind}-{seed}")
            for seed, kind in itertools.product(args.seeds, KINDS)]  # fmt: skip


def train(args: argparse.Namespace, runs: Sequence[Run]) -> list[Run]:
    """Train all at once; those that came to their end. The others are told, with the end of their output."""
    held_out = args.out / "held_out"
    if not held_out.exists():
        made = [sys.executable, ROOT / "tools" / "make_world.py", held_out, "--unseen", "--seed", "999"]
        subprocess.run([*map(str, made), "--cases", str(args.held_out)], check=True)
    start = args.out / "start"
    if not start.exists():  # its fusion has what the shipped start's has not
        start_with(args.from_model, start, config.load(args.config, args.set).model, seed=0)
    started, children = time.monotonic(), []
    for number, run in enumerate(runs):
        run.folder.mkdir(parents=True, exist_ok=True)
        card = args.cards[number % len(args.cards)]
        own = [*KINDS[run.kind], *args.set]
        own += [f"train.learning_rate={run.rate}", f"train.seed={run.seed}", f"train.steps={args.steps}"]
        own += [f"train.pretrained={start}", f"train.held_out=['{held_out / 'records.jsonl'}']"]
        own += [f"train.checkpoint_every={max(1, args.steps // 4)}", "train.keep_checkpoints=1", "data.workers=3"]
        command = [sys.executable, ROOT / "train_scripts" / "train_mige.py", args.config, "--output", run.folder, *own]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(card), "OMP_NUM_THREADS": "2"}
        output = (run.folder / "output.txt").open("w")
        children.append(subprocess.Popen([*map(str, command)], env=environment, stdout=output, stderr=output))
    whole = []
    for run, child in zip(runs, children, strict=True):
        try:
            code = child.wait(max(1.0, args.seconds - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        if code == 0:
            whole.append(run)
        else:
            tail = (run.folder / "output.txt").read_text().splitlines()[-12:]
            print(f"{run.folder.name} ended with {code}:", *tail, sep="\n  ", flush=True)
    print(f"{len(whole)} of {len(runs)} runs whole after {time.monotonic() - started:.0f} s", flush=True)
    return whole


def held_out_lines(args: argparse.Namespace, runs: Sequence[Run]) -> list[dict]:
    """The held-out losses of all checkpoints of all runs, also of those that were ended."""
    lines = []
    for run in runs:
        found, _ = read_json_lines(run.folder / "held_out.jsonl")
        lines += [{"kind": run.kind, "seed": run.seed, "rate": run.rate, **line} for _, line in found]
    append_json_lines(args.out / "held_out.jsonl", lines)
    return lines


def score(args: argparse.Namespace, runs: Sequence[Run]) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """(kind, seed) -> the scores of the unseen cases by measure, float [C], NaN where a case has none."""
    mixture = config.load(args.config, args.set).data.world
    chosen = [case for case in make_cases(args.per_kind, kinds=list(mixture)) if case.split == "unseen"]
    found = {}
    for run in runs:
        model = sorted((run.folder / "checkpoints").glob("step-*"))[-1] / "model"
        pipeline = MIGEPipeline.from_pretrained(model, dtype=torch.float32)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        rows = bench.run(pipeline, chosen, run.folder / "bench", model=str(model), batch=128, steps=10)
        lines = [line for line in score_lines(rows) if line["split"] == "unseen"]
        append_json_lines(args.out / "scores.jsonl", [{"run": run.kind, "seed": run.seed, **line} for line in lines])
        values = {name: [v for line in lines if line["measure"] == name for v in line["values"]] for name in BOUNDS}
        found[run.kind, run.seed] = {name: np.array(some, dtype=float) for name, some in values.items()}
    return found


def compare(found: dict[tuple[str, int], dict[str, np.ndarray]], seeds: Sequence[int]) -> list[dict]:
    """Each kind minus float32 masters, a line a measure, with the verdict by the bound named before."""
    lines = []
    for name, bound in BOUNDS.items():
        runs = {kind: np.stack([found[kind, seed][name] for seed in seeds]) for kind in KINDS}
        for kind in list(KINDS)[1:]:
            share = name in SHARES
            apart = estimate(runs[kind], runs["mixed"], alike=list(runs.values()), share=share)
            least, most = (-apart.high, -apart.low) if share else (apart.low, apart.high)  # how much worse it may be
            line = {"measure": name, "kind": kind, "its mean": digits(float(np.nanmean(runs[kind])))}
            line |= {"masters": digits(float(np.nanmean(runs["mixed"]))), "difference": digits(apart.mean)}
            line |= {"low": digits(apart.low), "high": digits(apart.high), "cases": apart.cases, "bound": bound}
            verdict = "not worse" if most < bound else "worse" if least > bound else "not resolved"
            lines.append(line | {"verdict": verdict})
    return lines


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    args.out = args.out.resolve()
    runs = plan(args)
    whole = train(args, runs)
    lines = held_out_lines(args, runs)
    steps = sorted({line["step"] for line in lines})
    for line in lines:
        print(json.dumps({key: line[key] for key in ("kind", "seed", "rate", "step", "held_out/loss")}), flush=True)
    last = [line for line in lines if steps and line["step"] == steps[-1]]
    if args.what == "tune":
        for kind in KINDS:
            losses = {line["rate"]: line["held_out/loss"] for line in last if line["kind"] == kind}
            print(f"best: {kind}={min(losses, key=losses.get)}" if losses else f"no run of {kind}", flush=True)
        return
    if len(whole) < len(runs):
        raise SystemExit("error: not all runs came to their end, nothing to compare")
    compared = compare(score(args, whole), args.seeds)
    (args.out / "comparison.json").write_text(json.dumps(compared, indent=1) + "\n")
    print(table(compared, list(compared[0])))


if __name__ == "__main__":
    main()

"""Training on one GPU and on all of them: samples/s a card, scaling, host and GPU time, recompilations, memory.

    python benchmarks/bench_scaling.py output/scaling       # all GPUs of this machine; needs no weights and no data
    python benchmarks/bench_scaling.py output/scaling --modes one one_24 default --seconds-per-mode 150 --seconds 540
    python benchmarks/bench_scaling.py output/scaling --config configs/tiny.py --cpu --processes 2    # on CPUs

`train_mige.sh`'s launch of `train_mige.py`, on random weights made on the cards and synthetic latents in memory
(`training_worker.py`), in the order given; neighbours that take one card run side by side, one on each. Results go to
results.jsonl in the folder, a line of JSON at a time while a mode runs; one that reaches the limit is ended, and its
line says where it was. The table is printed at the end, and by --table from the lines that are there. --profile prints
where the time of a mode's step goes: launches by phase, the largest kernels and operators. --saving measures by how
much a checkpoint lengthens the longest step while it is saved (two, of which the first allocates the memory).
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from harness import ROOT, table

from mige.training import launch


@dataclass(frozen=True)
class Mode:
    """A row of the table: how it is launched and what is set."""

    one_card: bool
    launch: str | None  # LAUNCH of train_mige.sh; None: its default
    batch: int  # samples a card
    overrides: tuple[str, ...] = ()
    tokens: int = 256  # positions of every prompt; 0: of varied length
    steps: int | None = None  # None: as asked for


HALF, MASTERS = "train.precision=bfloat16", "train.precision=mixed"  # `auto` goes by the card's memory
MODES = {
    "one": Mode(True, None, 16, (HALF,)),
    "one_24": Mode(True, None, 24, (HALF,), steps=20),
    "one_float32": Mode(True, None, 16, (MASTERS,)),
    "lora": Mode(True, None, 48, ("train.trainable=lora",), steps=60),
    "lora_kept": Mode(True, None, 24, ("train.trainable=lora", "train.gradient_checkpointing=[]"), steps=60),
    "default": Mode(False, None, 16, (HALF,)),
    "default_float32": Mode(False, None, 16, (MASTERS,)),
    "fsdp2": Mode(False, "fsdp2", 16, (HALF,)),
    "fsdp2_float32": Mode(False, "fsdp2", 16, (MASTERS,)),
    "varied": Mode(True, None, 16, (HALF,), tokens=0),
}
COMMON = ("train.warmup=0", "train.sample_every=0", "train.trackers=[]", "train.steps=1000000",
          "train.checkpoint_every=1000000", "data.features='memory'")  # fmt: skip


def start(args: argparse.Namespace, name: str, cards: list[int]) -> subprocess.Popen:
    """A mode's training, on these cards."""
    mode, output = MODES[name], args.folder / "results.jsonl"
    batch = args.batch or mode.batch
    overrides = (*COMMON, f"train.batch_size={batch}", f"data.workers={0 if args.cpu else 4}", *mode.overrides)
    asked = {"PROCESSES": str(len(cards))} | ({"LAUNCH": mode.launch} if mode.launch and not args.cpu else {})
    arguments = [str(args.config), "--output", str(args.folder / "runs" / name), *overrides]
    plan = launch.plan(arguments, asked, 0 if args.cpu else len(cards))
    worker = str(ROOT / "benchmarks" / "training_worker.py")
    command = [worker if part == launch.SCRIPT else part for part in plan.command]
    bench = {"row": {"mode": name}, "tokens": args.tokens or mode.tokens, "warm_up": args.warm_up,
             "steps": min(args.steps, mode.steps or args.steps), "output": str(output),
             "checkpoints": 2 if name in args.saving else 0,
             "profile": str(args.folder / f"{name}.profile") if name in args.profile else None}  # fmt: skip
    variables = {
        "MIGE_BENCH": json.dumps(bench),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, cards)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    log = (args.folder / f"{name}.log").open("w")
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | plan.environment | variables, stdout=log, stderr=log)


def in_groups(names: list[str], cards: int) -> list[list[str]]:
    """The modes in their order, neighbours of one card together as far as there are cards."""
    groups: list[list[str]] = []
    for name in names:
        last = groups[-1] if groups else []
        if MODES[name].one_card and last and MODES[last[0]].one_card and len(last) < cards:
            last.append(name)
        elif MODES[name].one_card or cards > 1:
            groups.append([name])
    return groups


def run_together(args: argparse.Namespace, names: list[str], cards: list[list[int]], limit: float) -> None:
    """Modes at once, each on its cards and none longer than so many seconds."""
    running, started = {name: start(args, name, own) for name, own in zip(names, cards, strict=False)}, time.monotonic()
    while any(process.poll() is None for process in running.values()):
        if time.monotonic() - started > limit:
            for process in running.values():
                kill(process)
            break
        time.sleep(0.5)
    for name, process in running.items():
        seconds = round(time.monotonic() - started)
        line = {"mode": name, "exit_code": process.wait(), "mode_seconds": seconds}
        if process.returncode:
            line["failed"] = failure(args.folder / f"{name}.log", seconds)
        print(json.dumps(line), flush=True)
        with (args.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        shutil.rmtree(args.folder / "runs" / name, ignore_errors=True)  # a checkpoint has 44 GB and more
        if (args.folder / f"{name}.profile").exists():
            print((args.folder / f"{name}.profile").read_text(), flush=True)


def kill(process: subprocess.Popen) -> None:
    """End a launcher and its workers, which are in sessions of their own; by SIGTERM they would save."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        one.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def failure(log: Path, seconds: int) -> str:
    """The last line of a log that names an error; else, of what took too long, how far it was."""
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if "rror" in line]
    if said:
        return ([line for line in said if "Error: " in line] or said)[-1][-400:]
    warm = [line[line.index("warm-up: ") + 9 :] for line in lines if "warm-up: " in line]
    done = any(line.startswith("done") for line in warm)
    where = "in training" if done else f"in warm-up ({'; '.join(warm[-3:])})" if warm else "before the warm-up"
    return f"{where} after {seconds} s"


COLUMNS = ("mode", "processes", "batch", "tokens", "steps", "samples_per_second", "a_card", "scaling", "mfu",
           "seconds", "host_ms", "gpu_ms", "nccl_ms", "kernels", "recompiles", "peak_gib",
           "warm_up_seconds", "stalls", "checkpoint_seconds", "failed")  # fmt: skip


def rows(folder: Path) -> list[dict]:
    """What is known of every mode, with its rate a card against that of mode "one"."""
    known: dict[str, dict] = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        known[row["mode"]] = known.get(row["mode"], {}) | row
    alone = known.get("one", {}).get("a_card")
    for row in known.values():
        if alone and row.get("processes", 1) > 1:
            row["scaling"] = f"{row['a_card'] / alone:.1%}"
    return list(known.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results, logs and run folders go")
    parser.add_argument("--config", type=Path, default=Path("configs/mige_512.py"))
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()), help="cards (%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--batch", type=int, help="samples a card (each mode's own)")
    parser.add_argument("--tokens", type=int, help="positions of every prompt (each mode's own)")
    parser.add_argument("--warm-up", type=int, default=5, help="steps (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps measured at most (%(default)s)")
    parser.add_argument("--seconds-per-mode", type=float, default=240, help="a mode is ended then (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="all is ended then (%(default)s)")
    parser.add_argument("--profile", nargs="+", choices=MODES, default=[], help="modes whose kernels are printed")
    parser.add_argument("--saving", nargs="+", choices=MODES, default=[], help="modes that save two checkpoints")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.table:
        end = time.monotonic() + args.seconds
        for names in in_groups(args.modes, args.processes):
            alone, everyone = MODES[names[0]].one_card, list(range(args.processes))
            cards = [[card] for card in everyone] if alone else [everyone]
            run_together(args, names, cards, min(args.seconds_per_mode, end - time.monotonic()))
    print(table(rows(args.folder), COLUMNS), flush=True)


if __name__ == "__main__":
    main()

"""Training and inference on several GPUs against one: samples/s, scaling efficiency, MFU, memory; resuming on half.

    python benchmarks/bench_scaling.py output/scaling                      # all GPUs of this machine; needs no weights
    python benchmarks/bench_scaling.py output/scaling --parts speed --modes ddp/t5_frozen
    python benchmarks/bench_scaling.py output/scaling --config configs/tiny.py --device cpu --processes 1 2

Full-size random weights are made once in FOLDER (13 GB), then the project's own scripts run on them, launched as a user
does. Parts:
    speed      steps of train_mige.py in each mode, on one GPU where it fits and on more; the mean after a warm-up.
               Efficiency: samples/s a GPU over those of one GPU.
    resume     a run on the most GPUs and its checkpoint resumed on half of them, with twice the batch: losses
               compared.
    inference  infer.py; images/s of the denoising loop with encoding and decoding.
A line of JSON a measurement; one that fails says so and the next one runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from harness import ROOT, Machine, Report, parser
from transformers import AutoTokenizer

from mige import config
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.utils.files import whole_folder

BF16 = ("train.param_dtype=bfloat16", "train.optimizer=adamw_bf16")
MODES = {  # launch file, overrides
    "ddp/t5_frozen": ("ddp", ("train.trainable=text_encoder_frozen", *BF16)),
    "ddp/full": ("ddp", BF16),
    "fsdp2/full": ("fsdp2", ()),
    "zero2/full": ("zero2", ()),
}
PARTS = ("speed", "resume", "inference")
WHOLE_ON_ONE = ("ddp/t5_frozen", "ddp/full")  # float32 weights and moments do not fit one card of 80 GB
RESUMED = "ddp/t5_frozen"
RESUMED_STEPS = ("train.steps=20", "train.checkpoint_every=10", "train.log_every=1", "train.keep_checkpoints=2")
WARM_UP, LINES, EVERY = 2, 3, 5  # lines of metrics.jsonl left out and averaged; steps a line


def make_start(args: argparse.Namespace) -> Path:
    """A checkpoint folder of random weights in bfloat16 (float32 on a CPU) and a tokenizer of the same vocabulary."""
    start = args.folder / "start"
    if start.exists():
        return start
    device, dtype = ("cpu", torch.float32) if args.cpu else ("cuda", torch.bfloat16)
    script = [sys.executable, "tools/make_tiny_checkpoint.py", str(args.folder / "tiny")]
    subprocess.run(script, cwd=ROOT, check=True)
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "tiny" / "t5")
    torch.manual_seed(0)
    parts = build_parts(config.load(args.config).model, device=device, dtype=dtype)
    with whole_folder(start) as folder:
        MIGEPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolver2M()).save_pretrained(folder)
    return start


def launcher(launch: str, processes: int, cpu: bool) -> list[str]:
    """The command that starts a script in so many processes."""
    if cpu:  # accelerate starts one CPU process, whatever is asked for
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    file = "accelerate_config.yaml" if launch == "zero2" else f"configs/accelerate/{launch}.yaml"
    if processes == 1 and launch == "ddp":
        file = "configs/accelerate/one_gpu.yaml"
    launch_command = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launch_command, "--config_file", file, "--num_processes", str(processes)]


def train(args: argparse.Namespace, mode: str, processes: int, run: Path, *more: str) -> subprocess.Popen:
    launch, overrides = MODES[mode]
    command = [*launcher(launch, processes, args.cpu), "train_scripts/train_mige.py", str(args.config), "--output", run]
    common = (f"train.pretrained={str(args.folder / 'start')!r}", "train.warmup=0", "train.sample_every=0",
              "train.trackers=[]", f"data.workers={0 if args.cpu else 6}")  # fmt: skip
    log = run.with_suffix(".log").open("w")
    variables = {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        **({"ACCELERATE_USE_CPU": "true"} if args.cpu else {}),
    }
    return subprocess.Popen([*map(str, command), *common, *overrides, *more], cwd=ROOT, env=os.environ | variables,
                            stdout=log, stderr=log)  # fmt: skip


def lines(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def failure(run: Path) -> str:
    """The last line of a run's log that names an error, or that it lost patience."""
    log = run.with_suffix(".log")
    said = [line for line in log.read_text(errors="replace").splitlines() if "rror" in line]
    if named := [line for line in said if "Error: " in line]:
        return named[-1][-300:]
    if any("Fatal Python error: Aborted" in line for line in said):
        return f"too slow or stuck; {log} says where its processes stood"
    return said[-1][-300:] if said else "no error in its log"


def speed(args: argparse.Namespace, mode: str, processes: int) -> dict:
    """Mean of a few lines of metrics; the run is stopped then, as its checkpoint would take longer."""
    run = fresh(args.folder / f"speed-{mode.replace('/', '-')}-{processes}")
    never = 10**6
    process = train(args, mode, processes, run, f"train.batch_size={args.batch}", f"train.steps={never}",
                    f"train.checkpoint_every={never}", f"train.log_every={EVERY}")  # fmt: skip
    started, wanted = time.monotonic(), WARM_UP + LINES
    row = {"mode": mode, "processes": processes, "batch": args.batch}
    if len(measured := lines_until(process, run, wanted, args.patience)) < wanted:
        return row | {"failed": failure(run), "seconds": round(time.monotonic() - started)}
    kept = measured[WARM_UP:wanted]
    mean = {key: sum(line[key] for line in kept) / len(kept) for key in ("samples_per_second", "mfu", "memory_gib")
            if key in kept[0]}  # fmt: skip
    return row | {key: round(value, 3) for key, value in mean.items()}


def lines_until(process: subprocess.Popen, run: Path, wanted: int, patience: float) -> list[dict]:
    """The run's metrics, once it has written so many lines, ended by itself or lost patience; it is stopped then."""
    started = time.monotonic()
    while len(lines(run)) < wanted and process.poll() is None:
        if time.monotonic() - started > patience:
            launcher = psutil.Process(process.pid)
            launcher.suspend()  # or it ends the others as soon as the first is gone
            for worker in launcher.children():
                worker.send_signal(signal.SIGABRT)  # at which faulthandler writes the stacks of all its threads
                time.sleep(0.5)  # one after the other
            break
        time.sleep(0.2)
    kill(process)
    return lines(run)


def kill(process: subprocess.Popen) -> None:
    """End a launcher and its workers, which are in sessions of their own; by SIGTERM they would save."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in family:
        one.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)


def train_on_all(args: argparse.Namespace, processes: int) -> tuple[Path, list[dict]]:
    """20 steps on all processes, checkpoints at 10 and 20: the run and its metrics."""
    run = fresh(args.folder / "resume-all")
    process = train(args, RESUMED, processes, run, *RESUMED_STEPS, f"train.batch_size={args.batch // 2}")
    return run, lines_until(process, run, 20, args.patience)


def resume_on_half(args: argparse.Namespace, processes: int, whole: Path, first: list[dict]) -> dict:
    """The checkpoint of step 10 resumed on half the processes with twice the batch: losses compared."""
    half, row = fresh(args.folder / "resume-half"), {"mode": RESUMED, "processes": [processes, processes // 2]}
    if len(first) < 20:
        return row | {"failed": failure(whole)}
    (half / "checkpoints").mkdir(parents=True)
    (whole / "checkpoints" / "step-00000010").rename(half / "checkpoints" / "step-00000010")
    process = train(args, RESUMED, processes // 2, half, *RESUMED_STEPS, f"train.batch_size={args.batch}")
    second = lines_until(process, half, 10, args.patience)
    if [line["step"] for line in second] != list(range(11, 21)):
        return row | {"failed": failure(half)}
    losses = [(a["loss"], b["loss"]) for a, b in zip(first[10:], second, strict=True)]
    return row | {"losses_all": [round(a, 5) for a, _ in losses], "losses_half": [round(b, 5) for _, b in losses],
                  "largest_relative_difference": max(abs(b - a) / a for a, b in losses)}  # fmt: skip


def inference(args: argparse.Namespace, processes: int) -> dict:
    """infer.py on `args.images` copies of an edit, each with noise of its own."""
    records, out = args.folder / "records.jsonl", fresh(args.folder / f"inference-{processes}")
    photo = str(ROOT / "example_data" / "images" / "cat.jpg")
    row = {"multi_prompt": "make the sky night in<imagehere>", "entity_path": [photo], "source_path": [photo]}
    records.write_text("".join(json.dumps(row | {"id": f"cat{n}"}) + "\n" for n in range(args.images)))
    script = ["infer_scripts/infer.py", "--model", args.folder / "start", "--records", records, "--output", out]
    script += ["--device", "cpu", "--steps", 3] if args.cpu else ["--compile", "--vae-dtype", "bfloat16"]
    done = subprocess.run([*launcher("ddp", processes, args.cpu), *map(str, script)], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=args.patience)  # fmt: skip
    row = {"processes": processes, "images": args.images}
    if done.returncode:
        return row | {"failed": done.stderr[-300:]}
    written = sorted(path.stat().st_mtime for path in (out / "images").iterdir())
    first_batch = min(25 * processes, args.images // 2)  # whose compilation and loading do not count
    seconds = written[-1] - written[first_batch - 1]
    return row | {"images_per_second": round((len(written) - first_batch) / seconds, 2)}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("folder", type=Path, help="where weights and runs go")
    made.add_argument("--config", type=Path, default=Path("configs/mige_512.py"))
    made.add_argument("--processes", type=int, nargs="+", default=sorted({1, torch.cuda.device_count()} - {0}),
                      help="GPUs to use, number after number (%(default)s)")  # fmt: skip
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    made.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    made.add_argument("--batch", type=int, default=16, help="samples a process (%(default)s)")
    made.add_argument("--images", type=int, default=200, help="of the part inference (%(default)s)")
    made.add_argument("--patience", type=float, default=300, help="seconds a run may take (%(default)s)")
    args = made.parse_args(argv)
    args.folder, args.cpu = args.folder.absolute(), args.device == "cpu"
    if min(args.processes) < 1 or ("resume" in args.parts and max(args.processes) < 2):
        made.error(f"--processes is {args.processes}; expected 1 and more, 2 for the part resume")
    return args


def measure_speed(args: argparse.Namespace, report: Report) -> None:
    """Every mode on every number of processes; its efficiency where one process was measured."""
    alone: dict[str, float] = {}
    for mode in args.modes:
        for processes in args.processes:
            if processes == 1 and mode not in WHOLE_ON_ONE:
                continue
            row = speed(args, mode, processes)
            rate = row.get("samples_per_second")
            if processes == 1 and rate:
                alone[mode] = rate
            elif rate and mode in alone:
                row["efficiency"] = round(rate / processes / alone[mode], 3)
            report.add(row)


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    machine, most = Machine(args.device), max(args.processes)
    report = Report(machine, args.output)
    make_start(args)
    machine.free()  # of what the weights were made with: the runs need the whole card
    if "speed" in args.parts:
        measure_speed(args, report)
    if "resume" in args.parts:
        report.add(resume_on_half(args, most, *train_on_all(args, most)))
    for processes in args.processes if "inference" in args.parts else ():
        report.add(inference(args, processes))


if __name__ == "__main__":
    main()

"""train_mige.py on random weights made on the device and samples made in memory; `bench_scaling.py` launches it.

Everything else is the project's own: config, launch, wrapping, data loader, loop, metrics. Arguments are those of
train_mige.py. MIGE_BENCH holds JSON: `row` (facts that every line repeats), `tokens` (positions of every prompt, or 0:
drawn from 40 to 256), `warm_up` and `steps` to take, `output` (a file of JSON lines). A line is written after a tenth
of the steps, a fifth, half and all, so that a run that is cut off loses little: medians so far of the slowest process.
Where the seconds before the first step went is in the log.

A step's seconds are those from one start of a step to the next. What the host needs for one is measured in profiled
steps afterwards: their time less the waits for a full launch queue and for the GPU. `profile` in MIGE_BENCH prints
where it goes (`training_profile.py`); `checkpoints` is how many are saved after that while steps go on, whose stall is
the longest step with its saving less the median.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch
from torch import distributed as dist
from torch.utils.data import Dataset
from training_profile import marking, print_profile

from mige.cli import train_mige
from mige.config import Config
from mige.data.batch import TrainingSample
from mige.data.randomness import Dropout, sample_generator, sample_randomness
from mige.diffusion.solver import DPMSolver2M
from mige.inference.pipeline import MIGEPipeline
from mige.models.build import build_parts
from mige.models.encoder import set_product_dtype
from mige.models.instruction import Instruction
from mige.models.vae import Moments
from mige.tasks import Task
from mige.training import trainer
from mige.training.trainer import Trainer

BENCH = json.loads(os.environ["MIGE_BENCH"])
STARTED = psutil.Process().create_time()
WAIT = 50_000  # ns: a launch takes 3 to 10 us; one that takes longer than this waits for the queue


def fresh_pipeline(config: Config, device: torch.device) -> MIGEPipeline:
    """As `load_pretrained`, but made where they are used: disks and hosts move 13 GB slowly."""
    torch.manual_seed(config.train.seed)
    parts = build_parts(config.model, device=device, dtype=getattr(torch, config.train.param_dtype))
    if device.type != "cpu":
        set_product_dtype(parts["image_encoder"], getattr(torch, config.model.fusion["vision_dtype"]))
    return MIGEPipeline(**parts, tokenizer=None, scheduler=DPMSolver2M())


class Samples(Dataset):
    """Edits with one reference each, a function of their number, with moments as from a latent store."""

    def __init__(self, config: Config, pipeline: MIGEPipeline):
        self.seed, self.shape = config.train.seed, pipeline.latent_shape(config.data.size, config.data.size)
        self.side, self.levels = pipeline.image_encoder.config.image_size, config.train.noise_levels
        fusion = pipeline.fusion.config
        self.queries, self.limit = fusion.num_queries, fusion.max_tokens
        self.vocabulary = pipeline.text_encoder.config.vocab_size
        self.dropout = Dropout(config.data.drop_text, config.data.drop_source, config.data.drop_both)

    def __len__(self) -> int:
        return 100_000

    def epochs(self, samples: int) -> float:
        return samples / len(self)

    def latent_shape(self, number: int) -> tuple[int, int, int]:
        """Of the images of that sample."""
        return self.shape

    def __getitem__(self, number: int) -> TrainingSample:
        generator, shape = sample_generator(self.seed, number), self.latent_shape(number)
        randomness = sample_randomness(generator, 2, shape, self.dropout, self.levels, 1000)
        least = min(self.queries + 8, self.limit - 1)
        tokens = BENCH["tokens"] or int(torch.randint(least, self.limit + 1, (), generator=generator))
        words = torch.randint(3, self.vocabulary, (tokens - self.queries - 3,), generator=generator).tolist()
        mean, std = torch.randn(2, 2, *shape, generator=generator)
        vision = torch.randn(1, 3, self.side, self.side, generator=generator)
        instruction = Instruction(((5, 6), (*words, 1)))
        name, moments = str(number), Moments(mean, std.abs())
        return TrainingSample(name, name, Task.EDIT, 0, instruction, vision, None, moments, **randomness)


class MeasuredTrainer(Trainer):
    """Notes when every step starts and ends by itself after the last one that is asked for."""

    def __init__(self, *arguments):
        say("importing is done")
        super().__init__(*arguments)
        say("the model is on the device")
        self.starts, self.graphs, self.warm = [], 0, None
        self.reports = {BENCH["warm_up"] + max(1, BENCH["steps"] * share // 100) for share in (10, 20, 50, 100)}

    def _widths(self) -> list[int]:
        """Of the prompts that are asked for."""
        widths = super()._widths()
        return [min(width for width in widths if width >= BENCH["tokens"])] if BENCH["tokens"] else widths

    def _warm_up(self) -> None:
        super()._warm_up()
        say(torch._dynamo.utils.compile_times(aggregate=True))

    def _train_step(self, batches) -> None:
        taken = len(self.starts)
        self.starts.append(time.perf_counter())
        if taken == BENCH["warm_up"]:
            self.warm, self.graphs = time.time() - STARTED, compiled_graphs()
        if taken in self.reports:
            self._report(taken)
            self.starts[-1] = time.perf_counter()
        if taken == max(self.reports):
            self._finish(batches)
        super()._train_step(batches)

    def _seconds(self) -> list[float]:
        """Of the steps after the warm-up."""
        starts = self.starts[BENCH["warm_up"] :]
        return [b - a for a, b in itertools.pairwise(starts)]

    def _report(self, taken: int, **more) -> None:
        cuda, many = self.device.type == "cuda", self.accelerator.num_processes
        seconds = self._seconds()
        own = {
            "seconds": median(seconds),
            "slow_seconds": sorted(seconds)[-max(1, len(seconds) // 20)],
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
            "recompiles": compiled_graphs() - self.graphs,
            "warm_up_seconds": self.warm,
        }
        everyone = [None] * many
        if dist.is_initialized():
            dist.all_gather_object(everyone, own)
        else:
            everyone = [own]
        if not self.accelerator.is_main_process:
            return
        worst = {name: round(max(one[name] for one in everyone), 4) for name in own}
        settings, monitor = self.config.train, self.monitor
        rate = settings.batch_size * settings.gradient_accumulation_steps / worst["seconds"]
        cells = math.prod(self.pipeline.latent_shape(*[self.config.data.size] * 2)[1:])
        work = monitor._flops(BENCH["tokens"] or 148, 1, cells)
        row = {
            **BENCH["row"],
            "samples_per_second": round(rate * many, 2),
            "a_card": round(rate, 2),
            "mfu": monitor.peak and round(rate * work / monitor.peak, 4),
            **worst,
            "processes": many,
            "batch": settings.batch_size,
            "tokens": BENCH["tokens"] or "varied",
            "steps": taken - BENCH["warm_up"],
            "complete": taken == max(self.reports),
            "matrix_tflops": monitor.peak and round(monitor.peak / 1e12),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            **more,
        }
        with Path(BENCH["output"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def _finish(self, batches) -> None:
        """The host's share of a step, then where it goes and what checkpoints cost where that is asked for; the end."""
        more = self._host_time(batches) if self.device.type == "cuda" else {}
        self._report(len(self.starts) - 1, **more)
        if BENCH.get("profile"):
            self._profile(batches)
        if BENCH.get("checkpoints"):
            self._report(len(self.starts) - 1, **more, **self._stalls(batches, BENCH["checkpoints"]))
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)

    def _host_time(self, batches, steps: int = 3) -> dict:
        """Milliseconds a step: the host's work, the GPU's, and how many kernels it ran."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            started = time.perf_counter()
            for _ in range(steps):
                self._step(batches)
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
        events = profiler.profiler.kineto_results.events()
        calls = [e for e in events if e.device_type() == torch.autograd.DeviceType.CPU and e.name().startswith("cu")]
        kernels = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
        waits = sum(e.duration_ns() for e in calls if e.duration_ns() > WAIT) / 1e9
        nccl = sum(e.duration_ns() for e in kernels if "nccl" in e.name().lower()) / 1e9
        busy = sum(e.duration_ns() for e in kernels) / 1e9 - nccl
        return {
            "host_ms": round(1000 * (wall - waits) / steps, 1),
            "gpu_ms": round(1000 * busy / steps, 1),
            "nccl_ms": round(1000 * nccl / steps, 1),
            "kernels": len(kernels) // steps,
            "profiled_ms": round(1000 * wall / steps, 1),
        }

    def _step(self, batches) -> None:
        Trainer._train_step(self, batches)
        self.monitor.flush(all_but=1)
        self.step += 1

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _profile(self, batches) -> None:
        encoder = self.plain.encoder
        names = ("image_encoder", "qformer", "fusion", "text_encoder")
        parts = {name: getattr(encoder, name) for name in names} | {"transformer": self.plain.transformer}
        functions = {
            "forward": (self, "_loss"),
            "backward": (self.accelerator, "backward"),
            "clipping": (trainer, "clip_gradients"),
            "metrics": (self.monitor, "add"),
            "reading metrics": (self.monitor, "flush"),
            **{f"optimizer {n}": (one, "step") for n, one in enumerate(self.optimizers)},
            **{f"zero_grad {n}": (one, "zero_grad") for n, one in enumerate(self.optimizers)},
            **({"averages": (self.ema, "step")} if self.ema is not None else {}),
        }
        path = Path(BENCH["profile"] if self.accelerator.is_main_process else os.devnull)
        with path.open("w") as file, contextlib.redirect_stdout(file):
            print_profile(partial(self._step, batches), partial(marking, parts, functions), self._wait)

    def _stalls(self, batches, many: int) -> dict:
        """Seconds by which each of so many checkpoints lengthens the longest step, and until it is whole."""
        free, stalls, whole = shutil.disk_usage(self.run_folder).free, [], []
        needed = 2.2 * sum(t.nbytes for t in self.state.tensors().values())
        if free < needed:
            return {"stalls": f"the disk has {free / 2**30:.0f} GiB, {needed / 2**30:.0f} are needed"}
        usual = median(self._seconds())
        for _ in range(many):
            taken, saved, whole_everywhere, told = [], time.perf_counter(), False, None
            while len(taken) < 5 or not whole_everywhere:  # all take as many steps; read a step late, as losses are
                started = time.perf_counter()
                self._step(batches)
                if not taken:
                    self._save(judge=False)
                done = torch.tensor(float(self.checkpoints.pending[1].done())).to(self.device, non_blocking=True)
                whole_everywhere = told is not None and float(told) == 1
                told = self.accelerator.reduce(done, "mean")
                taken.append(time.perf_counter() - started)
            whole.append(round(time.perf_counter() - saved, 1))
            stalls.append(round(max(taken) - usual, 2))
            self.checkpoints.wait()
        return {"stalls": stalls, "checkpoint_seconds": whole}


def say(what: str) -> None:
    """Of the first process, into the log."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{time.time() - STARTED:.0f} s: {what}", flush=True)


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main() -> None:
    trainer.load_pretrained, trainer.load_dataset = fresh_pipeline, Samples
    trainer.frozen_digest = lambda *_: ""  # there is no tokenizer, and nothing is resumed
    trainer.Trainer = MeasuredTrainer
    sys.exit(train_mige.main())


if __name__ == "__main__":
    main()

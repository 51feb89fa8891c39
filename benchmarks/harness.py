"""What the benchmarks share: clocks, peak memory, the line that names the machine, JSON lines, the table.

A benchmark makes a `Machine` and a `Report`, whose first line says on what it was measured, and writes a line a case.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from mige.training.flops import measured_peak_flops

ROOT = Path(__file__).parent.parent
GIB = 2**30


class Machine:
    """A device with its clocks and its memory."""

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    @cached_property
    def peak_flops(self) -> float | None:
        """The card's bfloat16 matrix rate, measured, FLOP/s; None on a CPU."""
        return measured_peak_flops(self.device)

    def facts(self) -> dict:
        """What a number is worth nothing without: device, cores, versions."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        return {"device": name, "cpu_cores": os.cpu_count(), "cuda": torch.version.cuda, **versions}

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call, by the host's clock, the device's work included."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def median_seconds(self, work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
        """Of `repeats` calls by the host's clock, after `warm_up` that do not count."""
        for _ in range(warm_up):
            work()
        return statistics.median(self.seconds(work) for _ in range(repeats))

    def median_ms(self, work: Callable[[], object], calls: int = 4, rounds: int = 5, warm_up: int = 3) -> float:
        """Milliseconds a call by the GPU's events (on a CPU by the host's clock): the median of `rounds` of `calls`.

        The rounds are enqueued one behind the other, so that short kernels do not wait for the host in between.
        """
        for _ in range(warm_up):
            work()
        if not self.on_gpu:
            return 1000 * statistics.median(self.seconds(work) for _ in range(rounds))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(calls):
                work()
            event.record()
        self.wait()
        return statistics.median(a.elapsed_time(b) / calls for a, b in itertools.pairwise(events))

    def reset_peak(self) -> None:
        """Count the peak of memory from an empty cache on."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self, *, reserved: bool) -> float | None:
        """GiB since the reset, None on a CPU. `reserved`: what was taken from the device, graphs' memory included."""
        if not self.on_gpu:
            return None
        peak = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
        return round(peak(self.device) / GIB, 2)

    def free(self) -> None:
        """Give back what a case has left behind on the GPU."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    def print_kernels(self, work: Callable[[], object], title: str, rows: int = 25) -> None:
        """The kernels (on a CPU the operators) of one call that take the longest."""
        kind = torch.profiler.ProfilerActivity.CUDA if self.on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as profiler:
            work()
            self.wait()
        spent = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events = [e for e in profiler.key_averages() if not getattr(e, "is_user_annotation", False)]
        events.sort(key=lambda e: -getattr(e, spent))
        total = sum(getattr(e, spent) for e in events)
        print(f"{total / 1000:9.2f} ms, {sum(e.count for e in events)} calls of {title}")
        for e in events[:rows]:
            print(f"{getattr(e, spent) / 1000:9.3f} ms {getattr(e, spent) / total:6.1%} {e.count:6d} x {e.key[:110]}")


class PhaseClock:
    """Marks between the phases of a step, on the GPU's clock and on the host's. A step begins with the mark "start"."""

    def __init__(self, machine: Machine):
        self.machine, self.marks = machine, []

    def mark(self, ended: str) -> None:
        """`ended`: the phase before this mark."""
        event = None
        if self.machine.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((ended, time.perf_counter(), event))

    def medians(self) -> dict:
        """{"seconds": of a step, "host_ms": {phase: ...}, "gpu_ms": {phase: ...}}, medians over the steps.

        A step lasts from its first mark to the next step's, the last one to its last mark; on the GPU's clock where
        there is one, the time included in which it waits for the host.
        """
        self.machine.wait()
        host, gpu = (lambda a, b: 1000 * (b[1] - a[1])), (lambda a, b: a[2].elapsed_time(b[2]))
        starts = [mark for mark in self.marks if mark[0] == "start"]
        best = gpu if self.machine.on_gpu else host
        steps = [best(a, b) for a, b in itertools.pairwise([*starts, self.marks[-1]])]
        result = {"seconds": round(statistics.median(steps) / 1000, 4)}
        for name, between in {"host_ms": host, **({"gpu_ms": gpu} if self.machine.on_gpu else {})}.items():
            phases: dict[str, list[float]] = {}
            for before, mark in itertools.pairwise(self.marks):
                if mark[0] != "start":
                    phases.setdefault(mark[0], []).append(between(before, mark))
            result[name] = {phase: round(statistics.median(all_ms), 1) for phase, all_ms in phases.items()}
        return result


class Report:
    """JSON lines on stdout and, where a file is given, appended to it; the first one names the machine."""

    def __init__(self, machine: Machine, output: Path | None = None, **facts: object):
        self.machine, self.output, self.lines = machine, output, []
        self._write(machine.facts() | facts)

    def add(self, line: dict) -> dict:
        """Write a measured line and keep it."""
        self.lines.append(line)
        return self._write(line)

    def attempt(self, case: dict, measure: Callable[[], dict]) -> None:
        """Add what `measure` gives; if it fails, a line says so, as one case must not cost the others their time."""
        try:
            self.add(case | measure())
        except torch.OutOfMemoryError:
            self._write(case | {"failed": "out of memory"})
        except Exception as error:
            traceback.print_exc()
            self._write(case | {"failed": f"{type(error).__name__}: {error}"[:2000]})
        self.machine.free()

    def skip(self, case: dict, why: str) -> None:
        """Say that a case was not measured."""
        self._write(case | {"skipped": why})

    def _write(self, line: dict) -> dict:
        text = json.dumps(line)
        print(text, flush=True)
        if self.output is not None:
            with self.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        return line


@contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """End the process, whatever it is at, if it is still inside by then: the lines so far are written."""

    def end() -> None:
        print("time limit", flush=True)
        os._exit(0)

    clock = threading.Timer(seconds, end)
    clock.daemon = True
    clock.start()
    try:
        yield
    finally:
        clock.cancel()


def table(lines: Sequence[dict], columns: Sequence[str]) -> str:
    """Lines as a Markdown table; "-" where a line has no such column or None in it."""
    rows = [columns, ["---"] * len(columns)]
    rows += [[str(line[name]) if line.get(name) is not None else "-" for name in columns] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, whose docstring is its help, with what all of them take."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    made.add_argument("--output", type=Path, help="file that the lines are appended to as well")
    return made


def digits(value: float, many: int = 3) -> float:
    """Rounded to so many significant digits."""
    return float(f"{value:.{many}g}")

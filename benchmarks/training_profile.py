"""Where the time of a training step goes, by torch.profiler: phases with their launches, kernels, the host's operators.

`training_worker.py` prints it after the measured steps; a line of a phase counts what none of the phases in it counts.
"""

import cProfile
import io
import pstats
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "phase: "
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaMemcpy", "cudaMemset", "cudaGraphLaunch")


def print_profile(step: Callable[[], None], phases: Callable[[], ExitStack], wait: Callable[[], None], rows: int = 25):
    """Three steps under torch.profiler and three under Python's, each printed as a table of a step.

    Args:
        step: one training step. phases: entered around them, marks the phases. wait: for the device.
    """
    cuda = torch.cuda.is_available()
    with phases(), profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        for _ in range(3):
            step()
        wait()
    for line in by_phase(seen.profiler.kineto_results.events()):
        print(line)
    averages = [event for event in seen.key_averages() if not event.key.startswith(MARK)]
    for title, spent in (("kernels", "self_device_time_total"), ("operators of the host", "self_cpu_time_total")):
        own = [e for e in averages if (e.device_type == DeviceType.CUDA) == (title == "kernels") and getattr(e, spent)]
        own.sort(key=lambda event: -getattr(event, spent))
        total = sum(getattr(event, spent) for event in own) / 3000
        print(f"-- {title}: {total:.1f} ms, {sum(e.count for e in own) // 3} calls a step")
        for event in own[:rows]:
            print(f"{getattr(event, spent) / 3000:9.3f} ms {event.count / 3:8.1f} x {event.key[:120]}")
    python = cProfile.Profile()
    with python:
        for _ in range(3):
            step()
    text = io.StringIO()
    pstats.Stats(python, stream=text).sort_stats("tottime").print_stats(rows)
    wait()
    print("-- Python's functions, three steps\n" + text.getvalue(), flush=True)


def by_phase(events) -> Iterator[str]:
    """A line a phase: the host's time in it and its launches (on a CPU: its operators), both a step of three.

    events: of kineto, with the marks among them.
    """
    host = [event for event in events if event.device_type() == DeviceType.CPU]
    marks = [(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in host if e.name().startswith(MARK)]
    launches = [e.start_ns() for e in host if e.name().startswith(LAUNCHES)]
    launches = launches or [e.start_ns() for e in host if e.name().startswith("aten::")]
    changes = sorted([(start, 1, name, -end) for start, end, name in marks]
                     + [(end, 0, name, 0) for _, end, name in marks] + [(at, 2, "", 0) for at in launches],
                     key=lambda change: (change[0], change[1], change[3]))  # fmt: skip
    spent, counted, inside, before = defaultdict(int), defaultdict(int), [], 0
    for at, kind, name, _ in changes:
        phase = inside[-1] if inside else MARK + "between"
        if inside or before:
            spent[phase] += at - before
        before = at
        if kind == 2:
            counted[phase] += 1
        elif kind == 1:
            inside.append(name)
        elif name in inside:
            inside.remove(name)
    yield f"-- phases: {sum(spent.values()) / 3e6:.1f} ms of the host, {sum(counted.values()) // 3} launches a step"
    for name in sorted(spent, key=spent.get, reverse=True):
        yield f"{spent[name] / 3e6:9.2f} ms {counted[name] / 3:8.1f} x {name.removeprefix(MARK)}"


@contextmanager
def marking(parts: dict[str, nn.Module], functions: dict[str, tuple[object, str]]) -> Iterator[None]:
    """Forward passes of these parts and calls of these attributes (owner, its name) are phases."""
    with ExitStack() as stack:
        for name, part in parts.items():
            stack.enter_context(_replaced(part, "forward", name))
        for name, (owner, attribute) in functions.items():
            stack.enter_context(_replaced(owner, attribute, name))
        yield


@contextmanager
def _replaced(owner: object, attribute: str, name: str) -> Iterator[None]:
    own = vars(owner).get(attribute)
    called = getattr(owner, attribute)

    def marked(*args, **kwargs):
        with record_function(MARK + name):
            return called(*args, **kwargs)

    setattr(owner, attribute, marked)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, own)

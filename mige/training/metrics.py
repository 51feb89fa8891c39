"""What is averaged between two lines of metrics.jsonl.

Letters: B samples.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mige.tasks import Task
from mige.utils.files import json_lines, read_json_lines, write_text

QUARTILES = ("0-249", "250-499", "500-749", "750-999")


@dataclass(frozen=True)
class StepMetrics:
    """What a micro-batch gave, still on its way from the GPU: reading it at once would leave the GPU without work."""

    step: int
    micro: int  # its number in the step
    everyone: Tensor  # float32 [5, all samples]: mse, vb, place in `Task`, time, whether their process is to stop
    norm: Tensor | None  # of the gradient, where an optimiser step ended
    work: float  # useful FLOPs of this process


class Metrics:
    """Means over the losses since the last line: loss and its terms, by task and by quartile of the timestep.

    `noise_levels`: losses that every sample has.
    """

    def __init__(self, noise_levels: int):
        self.noise_levels = noise_levels
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.work = 0.0  # useful FLOPs of this process
        self.data_wait = 0.0  # seconds that this process has waited for its micro-batches
        self.started = time.perf_counter()

    def work_a_second(self) -> float:
        """Useful FLOP/s of this process since the last line."""
        return self.work / (time.perf_counter() - self.started)

    def add(self, mse_B: Tensor, vb_B: Tensor, task_B: Tensor, time_B: Tensor, timesteps: int) -> None:
        """The samples of all processes of one micro-batch, [B] each; `task_B` holds positions in `Task`."""
        tasks = list(Task)
        rows = zip(mse_B.tolist(), vb_B.tolist(), task_B.tolist(), time_B.tolist(), strict=True)
        for mse, vb, task, when in rows:
            total = mse + vb
            quartile = QUARTILES[4 * int(when) // timesteps]
            for name, value in (
                ("loss", total),
                ("mse", mse),
                ("vb", vb),
                (f"loss/{tasks[int(task)]}", total),
                (f"loss/t {quartile}", total),
            ):
                self.sums[name] += value
                self.counts[name] += 1

    def pop_means(self, **more: Any) -> dict[str, Any]:
        """The means, samples a second, and what else is given; starts anew."""
        seconds = time.perf_counter() - self.started
        means = {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}
        rate = self.counts["loss"] / self.noise_levels / seconds
        result = {**more, **means, "samples_per_second": rate, "data_wait_seconds": self.data_wait}
        self._reset()
        return result


def truncate_log(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a line cut off by a kill."""
    if not path.exists():
        return
    rows, _ = read_json_lines(path)
    write_text(path, json_lines(row for _, row in rows if row.get("step", step + 1) <= step))

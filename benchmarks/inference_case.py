"""A case of bench_inference.py: task, batch, mode and perhaps steps."""

import argparse
from dataclasses import dataclass

from mige.tasks import Task

REBUILT = ("offload", "t5-8", "t5-4")  # options that change the pipeline for good
APPROXIMATE = {f"reuse{n}": {"reuse": n} for n in (2, 3, 4, 5)}
OPTIONS = ("plain", "naive", "compiled", "vae16", *REBUILT, *APPROXIMATE)


@dataclass(frozen=True)
class Case:
    """What is measured, written "edit/25/compiled" or, with its own number of steps, "edit/25/compiled@20"."""

    task: str
    batch: int
    mode: str
    steps: int | None = None

    @classmethod
    def read(cls, text: str) -> "Case":
        """Raises argparse.ArgumentTypeError for what is no case."""
        try:
            name, at, steps = text.partition("@")
            task, batch, mode = name.split("/")
            case = cls(task, int(batch), mode, int(steps) if at else None)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not task/batch/mode or task/batch/mode@steps") from error
        if task not in ("dit", *Task) or not set(case.options) <= set(OPTIONS) or case.batch < 1:
            known = f"tasks dit, {', '.join(Task)}; modes {', '.join(OPTIONS)}"
            raise argparse.ArgumentTypeError(f"{text!r}: expected {known}")
        if case.steps is not None and (task == "dit" or case.steps < 1):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a step at least, and none in a dit case")
        return case

    @property
    def options(self) -> list[str]:
        """The mode's parts."""
        return self.mode.split("+")

    @property
    def rebuilds(self) -> list[str]:
        """Its options that change the pipeline for good."""
        return sorted(set(self.options) & set(REBUILT))

    @property
    def name(self) -> str:
        """Without the steps, which a line has beside it."""
        return f"{self.task}/{self.batch}/{self.mode}"

    def __str__(self) -> str:
        return self.name if self.steps is None else f"{self.name}@{self.steps}"

"""How long the work takes: what is left of the run at work, and what a run takes as a rule."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

WEIGHT = 0.3  # of the newest run in what is typical


class Pace:
    """Told of every run by the thread that works, asked by any other.

    `typical`: seconds of a run, a moving average; None before the first has ended.
    """

    def __init__(self):
        self.typical: float | None = None
        self._started: float | None = None
        self._part = 0.0  # of the steps of the run at work that are done

    @contextmanager
    def running(self) -> Iterator[None]:
        """A run; one that fails or is stopped says nothing about the others."""
        self._started, self._part = time.perf_counter(), 0.0
        try:
            yield
            taken = time.perf_counter() - self._started
            self.typical = taken if self.typical is None else WEIGHT * taken + (1 - WEIGHT) * self.typical
        finally:
            self._started = None

    def step(self, number: int, of: int) -> None:
        """So many steps of the run at work are done."""
        self._part = number / of

    def left(self) -> float | None:
        """Seconds until the run at work ends, 0 without any; None where nothing can be told yet."""
        started, part = self._started, self._part
        if started is None:
            return 0.0
        taken = time.perf_counter() - started
        if part:
            return taken / part * (1 - part)
        return None if self.typical is None else max(0.0, self.typical - taken)

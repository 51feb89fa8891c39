"""Being asked to stop: SIGTERM, SIGHUP and Ctrl-C end a training after a checkpoint, with exit code 75."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREEMPTED = 75
"""Exit code of a training that was asked to stop: it is saved, start the same command again (EX_TEMPFAIL)."""

OUTCOME = "MIGE_OUTCOME_FILE"
"""Names the file in which a launcher is told how its training ends: torchrun makes every exit code a 1."""

TRAINING = "training"
"""Stands in that file while a stop is saved first."""

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop. A second Ctrl-C is not waited for: it raises KeyboardInterrupt."""

    def __init__(self):
        self.given = False
        self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals, but for those that were ignored when the process began: somebody above takes them."""
        before = {name: signal.getsignal(name) for name in _SIGNALS}
        for name, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(name, self._take)
        report_outcome(TRAINING)
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _take(self, number: int, _) -> None:
        self.given = True
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt


def exit_when_stopped() -> None:
    """Until a training listens, a stop ends the process at once, with the same code: there is nothing to save yet."""
    for name in _SIGNALS:
        if signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, lambda *_: sys.exit(PREEMPTED))


def report_outcome(text: str) -> None:
    """Tell the launcher, if one asks for it."""
    if (path := os.environ.get(OUTCOME)) and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).write_text(text)

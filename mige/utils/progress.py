"""How far work is, in one style for all commands: done, rate, time left, failures.

    with Progress(total=len(records), unit="image", desc="inference") as progress:
        ...
        progress.update(len(done), failed=len(errors))

On a terminal a bar. Elsewhere, as in a log, lines: one at first, one a minute at most, one at the end.
"""

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0
BAR_SECONDS = 0.1


class Progress(tqdm):
    """tqdm's bar with these words; it takes tqdm's arguments, so also something to go over.

    Args:
        unit: what is counted, one of them: "image".
    """

    failed = 0

    def __init__(self, *args: Any, unit: str, **options: Any):
        self.on_terminal = (options.get("file") or sys.stderr).isatty()
        every = BAR_SECONDS if self.on_terminal else LINE_SECONDS
        super().__init__(*args, unit=unit, mininterval=every, miniters=0, dynamic_ncols=True, **options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """tqdm's, with the words in place of its own; a part of an image counts as a part."""
        facts = super().format_dict
        gone, unit = facts["elapsed"], self.unit if hasattr(self, "unit") else ""
        rate = facts.get("rate") or ((self.n - self.initial) / gone if gone and not self.disable else 0)
        words = [f"{self.n:.1f}".removesuffix(".0") + (f"/{self.total}" if self.total else "") + f" {unit}s"]
        if rate:
            words.append(f"{rate:.2f} {unit}s/s" if rate >= 1 else f"{1 / rate:.2f} s/{unit}")
        if rate and self.total:
            words.append(f"{self.format_interval(max(0, self.total - self.n) / rate)} left")
        else:
            words.append(f"{self.format_interval(gone)} gone")
        words += [f"{self.failed} failed"] if self.failed else []
        has_bar = self.on_terminal and self.total
        facts["said"] = ", ".join(words)
        facts["bar_format"] = "{l_bar}{bar}| {said}" if has_bar else ("{desc}: " if self.desc else "") + "{said}"
        return facts

    def update(self, n: float | None = 1, failed: int = 0) -> bool | None:
        """Count what is done, `failed` of it to no avail."""
        self.failed += failed
        return super().update(n)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show how far it is: over what was shown, on a terminal; else as another line."""
        if self.on_terminal:
            super().display(msg, pos)
        else:
            self.fp.write(f"{self}\n")
            self.fp.flush()

    def close(self) -> None:
        """Show how far it came; no more after that."""
        if self.on_terminal or self.disable:
            super().close()
            return
        self.refresh()
        self.disable = True  # tqdm would end a line that has ended
        self._decr_instances(self)

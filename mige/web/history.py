"""What visitors made: a list a visitor, kept here as long as the server runs.

A visitor is known by a token that this server gave to the browser, and an entry by the token of its results. Files go
after a while (`FileStore.sweep`); their entries stay, with what was asked for.
"""

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mige.web.request import Request

MAX_VISITORS = 2000  # those who came longest ago are forgotten
MAX_ENTRIES = 60  # of one visitor; the oldest goes


@dataclass(frozen=True)
class Entry:
    """One run: the token of its results, and what was asked for."""

    token: str
    request: Request


class Histories:
    """The lists of all visitors. Safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._visitors: OrderedDict[str, OrderedDict[str, Entry]] = OrderedDict()

    def welcome(self, token: Any) -> str:
        """The token of a visitor: the one that was sent, if this server gave it, else a new one."""
        with self._lock:
            if not isinstance(token, str) or token not in self._visitors:
                token = secrets.token_urlsafe(24)
                self._visitors[token] = OrderedDict()
            self._visitors.move_to_end(token)
            while len(self._visitors) > MAX_VISITORS:
                self._visitors.popitem(last=False)
            return token

    def add(self, visitor: Any, entry: Entry) -> None:
        """Remember a run; one of nobody this server knows is not kept."""
        with self._lock:
            entries = self._of(visitor)
            if entries is not None:
                entries[entry.token] = entry
                while len(entries) > MAX_ENTRIES:
                    entries.popitem(last=False)

    def entries(self, visitor: Any) -> list[Entry]:
        """A visitor's runs, the newest first; none for nobody this server knows."""
        with self._lock:
            return list(reversed((self._of(visitor) or {}).values()))

    def find(self, visitor: Any, token: Any) -> Entry | None:
        """A visitor's own run by the token of its results; None for anything else."""
        with self._lock:
            return (self._of(visitor) or {}).get(token) if isinstance(token, str) else None

    def _of(self, visitor: Any) -> OrderedDict[str, Entry] | None:
        return self._visitors.get(visitor) if isinstance(visitor, str) else None

"""What a record is, and how what is wrong with one is reported."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mige.tasks import Task
from mige.utils.errors import UserError

ID_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?|.*\.", re.IGNORECASE)  # not storable on Windows
ID_RULE = "1 to 100 of A-Z a-z 0-9 . _ -, first and last not a dot, none of Windows' device names (CON, NUL, ...)"
SURROGATE = re.compile("[\ud800-\udfff]")  # half a pair: JSON can spell it, UTF-8 cannot
UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # JSON can spell these, no path or tokenizer takes them


@dataclass(frozen=True)
class Record:
    """One multimodal instruction. Hashable and picklable; compares by value."""

    id: str  # unique in the run and fit for a file name (ID_RULE)
    task: Task
    prompt: str  # as the user wrote it
    references: tuple[Path, ...]  # in the order of the placeholders; an edit's only reference is its source
    source: Path | None  # the image to edit; None for the subject task
    target: Path | None  # the true image, where the data has one
    edit_type: str | None  # of an Emu Edit row: its "task" column (global, local, add, ...), "" without; else None
    where: str  # "train.json, record 12 (id 7)", counted from 1: for messages
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # every other field of the row, untouched
    mask: Path | None = None  # of the source: white where it may change; None: everywhere


@dataclass(frozen=True)
class Issue:
    """One thing wrong (`fatal`) or noteworthy in the data; `str()` gives one readable line."""

    where: str
    message: str
    hint: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{'' if self.fatal else 'warning: '}{self.where}: {self.message}; {self.hint}"


class BadRecordsError(UserError, ValueError):
    """The data has errors; the message is the whole report."""


@dataclass
class Report:
    """The records without an error, and everything found on the way."""

    records: list[Record] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    @property
    def errors(self) -> list[Issue]:
        """What makes a record unusable."""
        return [issue for issue in self.issues if issue.fatal]

    @property
    def warnings(self) -> list[Issue]:
        """What is worth knowing and stops nothing."""
        return [issue for issue in self.issues if not issue.fatal]

    def text(self) -> str:
        """A line with the counts, then one line an issue, errors first."""
        counts = f"{count(len(self.errors), 'error')}, {count(len(self.warnings), 'warning')}"
        return "\n".join([counts, *map(str, self.errors), *map(str, self.warnings)])

    def raise_if_errors(self) -> list[Record]:
        """The records, if nothing was fatal; raises BadRecordsError with the whole report otherwise."""
        if self.errors:
            raise BadRecordsError(self.text())
        return self.records


def count(number: int, noun: str) -> str:
    """'1 error', '2 errors': for messages."""
    return f"{number} {noun}{'' if number == 1 else 's'}"

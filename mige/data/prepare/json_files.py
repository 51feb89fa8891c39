"""The rows of local .json and .jsonl files, from a position on."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mige.data.json_rows import read_rows
from mige.data.prepare.readers import Settings, SourceError


class JsonRows:
    """{"fields", "where", "folder"} of each row of local files, then {"problem"} of each that is no JSON."""

    def __init__(self, settings: Settings, columns: Sequence[str], position: Mapping[str, Any] | None):
        self.exhausted, self.taken = False, position["rows"] if position else 0
        self.files = [Path(given) for given in settings.inputs]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for row in islice(self._rows(), self.taken, None):
            self.taken += 1
            yield row
        self.exhausted = True

    def _rows(self) -> Iterator[Mapping[str, Any]]:
        for file in self.files:
            rows, issues = read_rows(file)
            if not rows:
                raise SourceError("; ".join(map(str, issues)))
            for number, row in rows:
                yield {"fields": row, "where": f"{file.name}, record {number}: ", "folder": str(file.parent)}
            yield from ({"problem": str(issue)} for issue in issues)

    def position(self) -> dict[str, Any]:
        """Rows taken; the files are read from the start to get there."""
        return {"rows": self.taken}

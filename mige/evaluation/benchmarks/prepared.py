"""Prepared folders of a benchmark: written from its own files, read back for scoring.

A prepared folder holds records.jsonl, which infer.py runs as it is, and benchmark.json, which names the protocol. A row
of records.jsonl carries under "score" what its image is compared with: paths and captions, a group to average by.
MagicBrush edited turn by turn has a file of records for each turn, since a turn starts from the image of the last.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from mige.evaluation.benchmarks.files import BenchmarkError, Options, read_file, read_json
from mige.evaluation.benchmarks.table import BENCHMARKS, CAPTIONS, Metric
from mige.utils.files import json_lines, read_json_lines, write_text


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, read back."""

    name: str
    options: Options
    rows: Sequence[Mapping[str, Any]]  # every row, scored or not
    folder: Path = field(compare=False)
    extra: Sequence[Metric] = ()  # measures beside the benchmark's own

    @property
    def scored(self) -> list[Mapping[str, Any]]:
        """The rows that have a score; of sessions edited turn by turn, those of the last turn."""
        return [row for row in self.rows if "score" in row]

    @property
    def metrics(self) -> list[Metric]:
        """The measures that the rows have something to compare with for (a caption may be missing)."""
        own = [m for m in BENCHMARKS[self.name].metrics if all(self._has(m, row["score"]) for row in self.scored)]
        return [*own, *self.extra]

    def _has(self, metric: Metric, score: Mapping[str, Any]) -> bool:
        return metric.against not in CAPTIONS or metric.against in score


def prepare(name: str, options: Options, folder: Path) -> list[Path]:
    """Write the prepared folder of a benchmark and return its files of records, in the order in which they run.

    Raises BenchmarkError for files that are missing or of another layout, for duplicate ids, and for a folder that
    holds another benchmark, or this one with other options.
    """
    benchmark = BENCHMARKS[name]
    _check_ours(name, options, folder)
    if name == "migebench" and not Path(options.data).is_dir():
        options = Options(**(asdict(options) | {"data": snapshot_download(options.data, repo_type="dataset")}))
    folder.mkdir(parents=True, exist_ok=True)
    config = {"benchmark": name, "options": asdict(options), "records": [], "rows": None}  # None: not there yet
    write_text(folder / "benchmark.json", json.dumps(config, indent=2) + "\n")
    rows = list(benchmark.rows(options, folder))
    ids = [row["id"] for row in rows]
    if twice := sorted({one for one in ids if ids.count(one) > 1} if len(set(ids)) < len(ids) else ()):
        raise BenchmarkError(f"{options.data}: {len(twice)} ids appear twice, the first is {twice[0]}")
    if options.iterative is None:
        parts = {"records.jsonl": rows}
    else:
        turns = sorted({row["turn"] for row in rows})
        parts = {f"turn_{n}.jsonl": [row for row in rows if row["turn"] == n] for n in turns}
    for file, some in parts.items():
        write_text(folder / file, json_lines(some))
    config |= {"records": list(parts), "rows": len(rows)}
    write_text(folder / "benchmark.json", json.dumps(config, indent=2) + "\n")
    return [folder / file for file in parts]


def _check_ours(name: str, options: Options, folder: Path) -> None:
    """Raise BenchmarkError unless the folder is new, or was prepared for the same benchmark and options."""
    advice = "give another --output, or delete the folder if nothing needs it"
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"{folder} is a file, expected a folder or nothing; give another --output")
    if not (folder / "benchmark.json").exists():
        if others := sorted(path.name for path in folder.glob("*.jsonl")):
            raise BenchmarkError(f"{folder} holds {others[0]}, but no benchmark.json: it is not ours; {advice}")
        return
    there = _config(folder)
    if there.name != name:
        raise BenchmarkError(f"{folder} holds {there.name}, expected {name} or nothing; {advice}")
    ours, theirs = asdict(options), asdict(there.options)
    differing = [f"{key}: {theirs[key]} there, {ours[key]} now" for key in ("split", "samples", "against", "iterative")
                 if ours[key] != theirs[key]]  # fmt: skip
    if differing:
        raise BenchmarkError(f"{folder} holds {name} with other options ({'; '.join(differing)}); {advice}")


def _config(folder: Path) -> "Prepared":
    """What benchmark.json says, without rows; raises BenchmarkError where it is cut or another file."""
    path = folder / "benchmark.json"
    config = read_json(path, "a prepared benchmark", dict)
    try:
        if config["benchmark"] not in BENCHMARKS:
            raise ValueError(f"benchmark {config['benchmark']!r}")
        return Prepared(config["benchmark"], Options(**config["options"]), (), folder)
    except (KeyError, TypeError, ValueError) as error:
        raise BenchmarkError(f"{path}: not what prepare_benchmark.py writes ({error!r}); prepare it again") from error


def read(folder: Path) -> Prepared:
    """A prepared folder; raises BenchmarkError if it is none, or not whole."""
    prepared, config = _config(folder), read_json(folder / "benchmark.json", "a prepared benchmark", dict)
    rows, listed = [], config.get("records")
    if not isinstance(listed, list) or any(not isinstance(one, str) or Path(one).name != one for one in listed):
        raise BenchmarkError(f"{folder / 'benchmark.json'}: its records are {listed!r:.80}; prepare it again")
    for file in listed:
        read_file(folder / file, "records")
        found, errors = read_json_lines(folder / file)
        bad = [
            f"{folder / file}, line {n}: no record with an id" for n, row in found if not isinstance(row.get("id"), str)
        ]
        if errors := errors + bad:
            raise BenchmarkError(f"{errors[0]} ({len(errors)} such lines); prepare it again")
        rows += [row for _, row in found]
    if len(rows) != config.get("rows"):
        raise BenchmarkError(f"{folder}: {len(rows)} records, expected {config.get('rows')}; prepare it again")
    return replace(prepared, rows=rows)

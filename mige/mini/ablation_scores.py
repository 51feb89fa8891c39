"""scores.jsonl and settings.json of the ablations: written a run at a time, read back and checked."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mige.mini import bench
from mige.mini.bench_measures import MEASURES
from mige.utils.errors import UserError
from mige.utils.files import parse_json_object, read_json_object, write_text


class AblationError(UserError, RuntimeError):
    """Runs that cannot start or resume; the message says why and what to do."""


def digest(settings: Mapping) -> str:
    """Eight letters that stand for settings; every line of scores has those it was made with."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def score_lines(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of `bench.run` -> a line for each kind, split and measure: n, mean, all values in the order of the cases.

    Also those of the two bounds, `copy` (None where nothing is edited) and `vae`. A case without this score has null.
    """
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for split in ("seen", "unseen"):
            same = sorted((r for r in rows if (r["kind"], r["split"]) == (kind, split)), key=lambda row: row["id"])
            for measure in MEASURES:
                values = {version: _values(same, version, measure) for version in bench.VERSIONS}
                if (model := values.pop("model")) is not None:
                    there = [value for value in model if value is not None]
                    line = {"kind": kind, "split": split, "measure": measure, "n": len(there)}
                    lines.append(line | {"mean": round(sum(there) / len(there), 6), "values": model} | values)
    return lines


def _values(rows: Sequence[Mapping], version: str, measure: str) -> list[float | None] | None:
    values = [row.get(version, {}).get(measure) for row in rows]
    return None if all(v is None for v in values) else [None if v is None else round(v, 6) for v in values]


_KEY = ("variant", "seed", "step", "kind", "split", "measure")


def read_scores(out: Path) -> list[dict]:
    """The lines of out/scores.jsonl, each once; none if there is no such file.

    Raises AblationError for a line that is not whole, for lines made with settings other than out/settings.json, and
    for a run that is there twice with different scores: all can come from merging files.
    """
    path = out / "scores.jsonl"
    if not path.exists():
        return []
    if not (out / "settings.json").exists():
        raise AblationError(f"{out} has scores.jsonl, but no settings.json: copy that of the runs beside it")
    setting, found = digest(read_settings(out)), {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            line = parse_json_object(text)
            key = tuple(line[name] for name in _KEY)
        except (ValueError, KeyError, TypeError) as error:
            raise AblationError(f"{path}, line {number} is not a line of scores: {error!r}; remove it") from error
        if line["setting"] != setting:
            raise AblationError(f"{path}, line {number} was made with other settings ({line['setting']}, expected "
                                f"{setting}): only runs of one settings.json can be compared")  # fmt: skip
        if found.setdefault(key, line) != line:
            raise AblationError(f"{path}, line {number}: {key[0]}, seed {key[1]} is there twice with other scores; "
                                "remove the lines of one of them")  # fmt: skip
    return list(found.values())


def read_settings(out: Path) -> dict[str, Any]:
    """out/settings.json; raises AblationError where it is cut or another file."""
    try:
        return read_json_object(out / "settings.json")
    except ValueError as error:
        raise AblationError(
            f"{error}; restore it (runs of the same options have the same), or use another folder"
        ) from error


def finished(lines: Sequence[Mapping], steps: Sequence[int]) -> set[tuple[str, int]]:
    """The (variant, seed) that have scores at all of these steps."""
    found = {(line["variant"], line["seed"], line["step"]) for line in lines}
    return {(name, seed) for name, seed, _ in found if all((name, seed, step) in found for step in steps)}


def enter(out: Path, name: str, seed: int, lines: Sequence[Mapping]) -> None:
    """Put a run's lines into the file, at once."""
    others = [line for line in read_scores(out) if (line["variant"], line["seed"]) != (name, seed)]
    write_text(out / "scores.jsonl", "".join(json.dumps(line) + "\n" for line in [*others, *lines]))

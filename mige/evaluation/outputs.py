"""Which image of a results folder belongs to which record, and which crop to which image."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.benchmarks.prepared import Prepared
from mige.utils.files import read_json_lines

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def outputs(prepared: Prepared, results: Path) -> dict[str, Path]:
    """The image of every record by its id: RESULTS/images/ID.png, or RESULTS/ID.png where there is no such folder.

    Raises BenchmarkError that lists what is missing, what belongs to no record, and ids with two files.
    """
    folder = results / "images" if (results / "images").is_dir() else results
    if not folder.is_dir():
        raise BenchmarkError(f"{results}: no such folder; give the one that infer.py wrote")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    many = Counter(path.stem for path in files)
    ids = {row["id"] for row in prepared.rows}
    wrong = {
        "missing": sorted(ids - many.keys()),
        "of no record": sorted(many.keys() - ids),
        "with two files": sorted(name for name, n in many.items() if n > 1),
    }
    found = [f"{len(names)} {what} ({_some(names)})" for what, names in wrong.items() if names]
    if found:
        raise BenchmarkError(f"{folder}: {'; '.join(found)}. expected one image for each of the {len(ids)} records")
    return {path.stem: path for path in files}


def crops(prepared: Prepared, folder: Path) -> dict[str, Path]:
    """The entity cut out of every output, by id, without those where nothing was found; see extract_entities.py."""
    path = folder / "entities.jsonl"
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; run tools/extract_entities.py first")
    rows, errors = read_json_lines(path)
    ids = {row["id"] for row in prepared.scored}
    lines = {line.get("id"): line for _, line in rows if isinstance(line.get("id"), str) and "crop" in line}
    for error in errors:
        print(f"warning: {error}", file=sys.stderr)
    if missing := sorted(ids - lines.keys()):
        raise BenchmarkError(f"{path}: {len(missing)} ids missing ({_some(missing)}); run extract_entities.py again")
    return {one: folder / lines[one]["crop"] for one in ids if lines[one]["crop"]}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", and {len(names) - 20} more" if len(names) > 20 else "")

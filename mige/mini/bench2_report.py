"""What a run of mini-bench 2 leaves for people: scores.json and a table of it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mige.mini import bench
from mige.mini.bench_measures import SHARES
from mige.utils.files import write_text

HEADINGS = ("kind", "split", "measure", "mean", "95 % interval", "n", "copy", "VAE")


def table(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of a run -> an entry for each kind, split and measure, as `bench.summarise` makes them, with two baselines.

    `copy` is the mean of the images to edit given back, `vae` of the right answers through the model's VAE, the bound;
    None where there is none.
    """
    entries, *baselines = (bench.summarise(rows, version) for version in bench.VERSIONS)
    vae, copy = ({_key(entry): entry["mean"] for entry in baseline} for baseline in baselines)
    return [entry | {"copy": copy.get(_key(entry)), "vae": vae.get(_key(entry))} for entry in entries]


def _key(entry: Mapping) -> tuple[str, str, str]:
    return entry["kind"], entry["split"], entry["measure"]


def text_table(rows: Sequence[Mapping]) -> str:
    """The table for a terminal."""
    lines = [HEADINGS, *(_cells(entry) for entry in table(rows))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cells(entry: Mapping) -> tuple[str, ...]:
    digits = 3 if entry["measure"] in SHARES else 4
    mean, low, high, copy, vae = (
        "-" if entry[name] is None else f"{entry[name]:.{digits}f}" for name in ("mean", "low", "high", "copy", "vae")
    )
    interval = "-" if entry["low"] is None else f"{low} to {high}"
    return entry["kind"], entry["split"], entry["measure"].replace("_", " "), mean, interval, str(entry["n"]), copy, vae


def write(rows: Sequence[Mapping], out: Path) -> Path:
    """Write out/scores.json: the settings of the run and its table; returns its path."""
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    scores = {"benchmark": "mini2", "cases": len(rows), "settings": settings, "table": table(rows)}
    write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    return out / "scores.json"

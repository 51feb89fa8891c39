"""Scores a sample -> the table: means with 95 % bootstrap intervals, by version and subset."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import timm
import torch
import torchvision
import transformers

import mige
from mige.evaluation import statistics
from mige.evaluation.backbones import Clip, Dino
from mige.evaluation.benchmarks import BENCHMARKS, BenchmarkError, Prepared
from mige.evaluation.scoring import VERSIONS


def protocol(prepared: Prepared, clip: Clip, dino: Dino) -> dict[str, str]:
    """Everything that two tables must share to be compared, as text."""
    options = prepared.options
    facts = {
        "benchmark": prepared.name,
        "CLIP": f"{clip.name}, weights {clip.fingerprint}",
        "CLIP's preprocessing": "shorter side to the input size (bicubic), centre crop",
        "DINO": f"{dino.name}, weights {dino.fingerprint}",
        "DINO's preprocessing": "shorter side to 256 (bicubic), centre crop 224",
        "intervals": f"percentiles of {statistics.RESAMPLES} bootstrap resamples, seed {statistics.SEED}",
    }
    if prepared.name == "dreambench":
        facts["pictures a prompt"] = str(options.samples)
        facts["compared with"] = "the input" if options.against == "input" else "all pictures of the subject"
    if prepared.name == "emu_edit":
        facts["split"] = options.split
        facts["another size"] = "the source is scaled and centre-cropped to the output's, as the model was shown it"
        facts["CLIPdir of equal captions"] = "0, counted in all rows, left out of the clean ones"
    if prepared.name == "magicbrush":
        facts["turns"] = "each on its own" if options.iterative is None else "final turn of iterative editing"
    if prepared.name in ("magicbrush", "migebench"):
        facts["another size"] = "the output is resized (bicubic) to the target's"
    return facts


def versions() -> dict[str, str]:
    """The libraries that a score depends on."""
    found = {"mige": mige.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    found |= {"transformers": transformers.__version__, "timm": timm.__version__, "diffusers": diffusers.__version__}
    return found | {"python": platform.python_version()}


def table(prepared: Prepared, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each version, subset (all, clean, and the groups) and measure that there is.

    An entry holds mean, low and high, n, and `of`: how many the whole benchmark has, None for a group.
    """
    size = BENCHMARKS[prepared.name].size(prepared.options)
    subsets = {"all": list(rows)}
    if any("clean" in row for row in rows):
        subsets["clean"] = [row for row in rows if row["clean"]]
    groups = dict.fromkeys(row["group"] for row in rows)
    subsets |= {group: [row for row in rows if row["group"] == group] for group in groups}
    entries = []
    for version in VERSIONS:
        for subset, some in subsets.items():
            for metric in BENCHMARKS[prepared.name].metrics:
                values = [row[version][metric.name] for row in some if metric.name in row.get(version, {})]
                if values:
                    mean, low, high = statistics.bootstrap(values)
                    entry = {"version": version, "subset": subset, "measure": metric.name, "mean": mean, "low": low}
                    of = size if subset == "all" else None
                    entries.append(entry | {"high": high, "n": len(values), "of": of})
    return entries


def beside(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The models' entries of other reports of the same protocol, labelled; raises BenchmarkError where one differs."""
    entries = []
    for other in others:
        ours, theirs = report["protocol"], other["protocol"]
        differing = [
            f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in {**ours, **theirs}
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            raise BenchmarkError(
                f"the report of {other['label']} follows another protocol ({'; '.join(differing)}): "
                "such scores never share a table; evaluate both in one way"
            )
        entries += [entry | {"version": other["label"]} for entry in other["table"] if entry["version"] == "model"]
    return entries

"""Scores a sample -> the table: means with 95 % intervals, by version and subset."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import timm
import torch
import torchvision
import transformers

import mige
from mige.evaluation import statistics
from mige.evaluation.backbones import Backbone
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import BENCHMARKS, CAPTIONS, PIXELS
from mige.evaluation.scoring import VERSIONS
from mige.evaluation.views import JPEG_QUALITY
from mige.utils.files import read_json_object


def protocol(prepared: Prepared, networks: Mapping[str, Backbone], *, jpeg: bool = False) -> dict[str, str]:
    """Everything that two tables must share to be compared, as text."""
    options, clusters = prepared.options, BENCHMARKS[prepared.name].clusters or "samples"
    facts = {
        "benchmark": prepared.name,
        "CLIP": f"{networks['clip'].name}, weights {networks['clip'].fingerprint}",
        "CLIP's preprocessing": "shorter side to the input size (bicubic), centre crop",
        "DINO": f"{networks['dino'].name}, weights {networks['dino'].fingerprint}",
        "DINO's preprocessing": "shorter side to 256 (bicubic), centre crop 224",
        "outputs": f"through JPEG of quality {JPEG_QUALITY}, as the official scripts save" if jpeg else "as saved",
        "copy of the input": "fitted to the output's size as the model is shown it: an edit's source scaled and "
        "cropped, a subject's image whole on black",
        "intervals": f"of {clusters}: percentiles of {statistics.RESAMPLES} bootstrap resamples, "
        f"seed {statistics.SEED}; below {statistics.FEW} Student's t",
    }
    for name, network in networks.items():
        if name not in ("clip", "dino"):
            facts[name] = f"weights {network.fingerprint}, {network.transform.words}"
    if kept := [metric.name for metric in prepared.extra if metric.of in PIXELS]:
        facts["preservation"] = f"{', '.join(kept)} ({prepared.extra[-1].against}); LPIPS 0.1, AlexNet"
    if prepared.name == "dreambench":
        facts["images a prompt"] = str(options.samples)
        facts["compared with"] = "the input" if options.against == "input" else "all images of the subject"
    if prepared.name == "emu_edit":
        facts["split"] = options.split
        facts["another size"] = (
            "the source is scaled and centre-cropped to the output's, as the model was shown it; "
            "L1 (stretched): the output is resized (bicubic) to the source's"
        )
        facts["CLIPdir of equal captions"] = "0, counted in all rows, left out of the clean ones"
    if prepared.name == "magicbrush":
        facts["turns"] = "each on its own" if options.iterative is None else "final turn of iterative editing"
        kinds = [metric.name for metric in prepared.metrics if metric.of == "clip" and metric.against in CAPTIONS]
        facts["captions"] = ", ".join(kinds)
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

    An entry holds mean, low and high (None of one value, which has no interval), n, and `of`: how many the whole
    benchmark has, None for a group.
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
            for metric in prepared.metrics:
                having = [row for row in some if metric.name in row.get(version, {})]
                values = [row[version][metric.name] for row in having]
                if values:
                    mean, low, high = statistics.interval(values, [row["cluster"] for row in having])
                    entry = {"version": version, "subset": subset, "measure": metric.name, "mean": mean, "low": low}
                    of = size if subset == "all" else None
                    entries.append(entry | {"high": high, "n": len(values), "of": of})
    return entries


_ENTRY = {"version": str, "subset": str, "measure": str, "mean": float | int, "n": int, "of": int | None}
_ENTRY |= {"low": float | int | None, "high": float | int | None}


def read_report(path: Path) -> dict[str, Any]:
    """A report.json of another run; raises BenchmarkError, naming file and field, for any other file."""
    try:
        report = read_json_object(path)
        for name, kind in (("label", str), ("protocol", dict), ("table", list)):
            if not isinstance(report.get(name), kind):
                raise ValueError(f"{path}: {name} is {report.get(name)!r:.80}, expected a {kind.__name__}")
        for n, entry in enumerate(report["table"], start=1):
            if not isinstance(entry, dict):
                raise ValueError(f"{path}: entry {n} of its table is {entry!r:.80}, expected an object")
            for name, kind in _ENTRY.items():
                if not isinstance(entry.get(name), kind):
                    raise ValueError(f"{path}: entry {n} of its table has the {name} {entry.get(name)!r:.80}")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read ({error.strerror}); give a report.json of evaluate.py") from error
    except ValueError as error:
        raise BenchmarkError(f"{error}; give a report.json of evaluate.py") from error
    return report


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

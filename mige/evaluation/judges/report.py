"""A judge's lines -> what report.json holds: protocol, means with intervals, agreement, order, errors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mige.evaluation import statistics, summary
from mige.evaluation.benchmarks.prepared import Prepared
from mige.evaluation.benchmarks.table import BENCHMARKS
from mige.evaluation.judges.agreement import agreement, position_bias
from mige.evaluation.judges.judge import Judge
from mige.evaluation.judges.judging import Plan
from mige.evaluation.judges.rubrics import Rubric

BY_GROUP = ("gedit", "imgedit", "omnicontext")  # officially the mean of their groups' means, whatever their sizes
OF_GROUPS = "mean of the groups"
PRODUCT = "CP x PF"  # DreamBench++'s: of the two means, not the mean of products

Lines = Sequence[Mapping[str, Any]]


def protocol(prepared: Prepared, judge: Judge, plan: Plan) -> dict[str, str]:
    """Everything that two tables must share to be compared, as text."""
    questions = {question for rubric in _rubrics(prepared, plan) for question in rubric.questions}
    hashes = sorted(f"{question.prompt} {question.hash}" for question in questions)
    clusters = BENCHMARKS[prepared.name].clusters or "samples"
    scales = sorted({f"{question.low} to {question.high}" for question in questions})
    return {
        "benchmark": prepared.name,
        **judge.settings,
        "prompts": ", ".join(hashes),
        "scale": ", ".join(scales),
        "asked": f"{plan.repeats} times"
        + (", each with the result first and last" if plan.swap else ", the result last"),
        "intervals": f"of {clusters}: percentiles of {statistics.RESAMPLES} bootstrap resamples, "
        f"below {statistics.FEW} of them Student's t",
        "images": "PNG, at most 1024 x 1024 px of area; docs/evaluation.md has each benchmark's sizes",
    }


def _rubrics(prepared: Prepared, plan: Plan) -> list[Rubric]:
    return list(dict.fromkeys(plan.rubric(prepared.name, row) for row in prepared.scored))


def measures(prepared: Prepared, plan: Plan) -> list[str]:
    """The columns of the table."""
    return list(dict.fromkeys(name for rubric in _rubrics(prepared, plan) for name in rubric.measures()))


def table(prepared: Prepared, lines: Lines, names: Sequence[str]) -> list[dict[str, Any]]:
    """An entry for each subset and measure that there is: mean, low and high (None without an interval), n and `of`.

    `of`: how many records there should be. What a judge did not score is in no mean, and n says so.
    """
    of = len(lines)
    whole = BENCHMARKS[prepared.name].size(prepared.options)
    entries = []
    for subset, some in _subsets(lines).items():
        for name in names:
            entries += _entry(subset, name, some, whole if subset == "all" else len(some))
            if prepared.name in BY_GROUP and subset in ("all", "intersection"):
                entries += _of_groups(subset, name, some)
    means = {entry["measure"]: entry["mean"] for entry in entries if entry["subset"] == "all"}
    if prepared.name == "dreambench_plus" and {"CP", "PF"} <= means.keys():
        product = {"version": "model", "subset": "all", "measure": PRODUCT, "mean": means["CP"] * means["PF"]}
        entries.append(product | {"low": None, "high": None, "n": of, "of": whole})
    return entries


def _subsets(lines: Lines) -> dict[str, Lines]:
    """All records, every group, and what records are tagged with besides."""
    found = {"all": lines}
    for tagged in (lambda line: [line["group"]], lambda line: line["also"]):
        for tag in dict.fromkeys(tag for line in lines for tag in tagged(line)):
            found[tag] = [line for line in lines if tag in tagged(line)]
    return found


def _entry(subset: str, name: str, some: Lines, of: int) -> list[dict[str, Any]]:
    having = [line for line in some if name in line["model"]]
    if not having:
        return []
    values = [line["model"][name] for line in having]
    mean, low, high = statistics.interval(values, [line["cluster"] for line in having])
    entry = {"version": "model", "subset": subset, "measure": name, "mean": mean, "low": low, "high": high}
    return [entry | {"n": len(values), "of": of}]


def _of_groups(subset: str, name: str, some: Lines) -> list[dict[str, Any]]:
    """The mean of the groups' means; without an interval."""
    groups: dict[str, list[float]] = {}
    for line in some:
        if name in line["model"]:
            groups.setdefault(line["group"], []).append(line["model"][name])
    if not groups:
        return []
    mean = sum(sum(values) / len(values) for values in groups.values()) / len(groups)
    label = OF_GROUPS if subset == "all" else f"{subset}, {OF_GROUPS}"
    entry = {"version": "model", "subset": label, "measure": name, "mean": mean, "low": None, "high": None}
    return [entry | {"n": sum(map(len, groups.values())), "of": None}]


def trust(lines: Lines, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each measure that was asked for more than once: agreement over repetitions, and the bias of the order."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if same := agreement(lines, name):
            found.setdefault(name, {})["agreement"] = asdict(same)
        if bias := position_bias(lines, name):
            found.setdefault(name, {})["result shown first, less last"] = dict(
                zip(("mean", "low", "high"), bias, strict=True)
            )
    return found


def note(prepared: Prepared, lines: Lines) -> str:
    """What a reader must know of these scores, in sentences."""
    whole = BENCHMARKS[prepared.name].size(prepared.options)
    said = ["The judge's prompts are this project's own: not comparable with published numbers."]
    if len(lines) < whole:
        said.append(f"{len(lines)} of the {whole} records of this benchmark: not comparable with whole runs.")
    if errors := sum(len(line["errors"]) for line in lines):
        asked = sum(len(line["answers"]) for line in lines)
        without = sum(1 for line in lines if not line["model"])
        said.append(f"{errors} of {asked} answers gave no score; {without} records have none at all.")
    if lost := sum("no reply" in error for line in lines for error in line["errors"]):
        said.append(f"{lost} questions got no reply: the same command asks them again.")
    return " ".join(said)


def facts(prepared: Prepared, judge: Judge, plan: Plan, lines: Lines, label: str) -> dict[str, Any]:
    """The whole of report.json."""
    names = measures(prepared, plan)
    return {
        "label": label,
        "protocol": protocol(prepared, judge, plan),
        "versions": summary.versions(),
        "note": note(prepared, lines),
        "measures": names + ([PRODUCT] if prepared.name == "dreambench_plus" else []),
        "table": table(prepared, lines, names),
        "trust": trust(lines, names),
        "errors": [{"id": line["id"], "error": error} for line in lines for error in line["errors"]],
    }

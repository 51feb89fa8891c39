"""The paper's claims as comparisons of the ablations' scores, with intervals and verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mige.evaluation.statistics import Estimate, estimate
from mige.mini.ablation import QUARTERS, VARIANTS, kinds_of, share
from mige.mini.ablation_scores import AblationError, finished, read_scores, read_settings
from mige.mini.bench_measures import CANDIDATES, SHARES
from mige.tasks import Task

CHANCE = 1 / CANDIDATES
MEASURED = {
    Task.SUBJECT: ("identity", "l1_subjects"),
    Task.EDIT: ("success", "l1_inside", "l1_outside"),
    Task.SUBJECT_EDIT: ("identity", "success", "l1_inside", "l1_outside"),
}
WORDS = {
    "identity": "identity among 64",
    "success": "success",
    "l1_inside": "L1 inside",
    "l1_outside": "L1 outside",
    "l1_subjects": "L1 of subjects",
    Task.SUBJECT: "subject-driven generation",
    Task.EDIT: "edits",
    Task.SUBJECT_EDIT: "subject edits",
    "chance": "chance (1 of 64)",
    "copy": "the input copied",
}
LABELS = {name: variant.label for name, variant in VARIANTS.items()}
LABELS |= {name: WORDS[name] for name in ("chance", "copy")}


@dataclass(frozen=True)
class Comparison:
    """What a claim of the paper says of two variants, or of a variant and a baseline ("chance", "copy").

    `equal`: "compute", both at their end, or "samples": b where it has seen as many samples of its tasks as a.
    The claim is that a is better.
    """

    claim: str
    a: str
    b: str
    equal: str
    task: Task
    measure: str


def _comparisons() -> list[Comparison]:
    """In the order of the paper's claims."""
    made = []
    for claim, other, task, measures in (
        ("joint training improves subject-driven generation", "subject_only", Task.SUBJECT, MEASURED[Task.SUBJECT]),
        ("joint training improves editing", "edit_only", Task.EDIT, ("success", "l1_inside")),
    ):
        made += [Comparison(claim, "joint", other, equal, task, measure)
                 for equal in ("samples", "compute") for measure in measures]  # fmt: skip
    claim, other = "subject edits emerge without their data", "without_subject_edit"
    made += [Comparison(claim, other, against, "compute", Task.SUBJECT_EDIT, measure)
             for against, measure in (("chance", "identity"), ("copy", "success"), ("copy", "l1_inside"))]  # fmt: skip
    claim = "training on subject edits improves them"
    made += [Comparison(claim, "joint", other, equal, Task.SUBJECT_EDIT, measure)
             for equal in ("samples", "compute") for measure in ("identity", "success")]  # fmt: skip
    claim, other = "VAE features in the instruction help", "without_vae_features"
    made += [Comparison(claim, "joint", other, "compute", task, measure)
             for task, measure in ((Task.EDIT, "l1_inside"), (Task.EDIT, "success"), (Task.SUBJECT, "identity"),
                                   (Task.SUBJECT_EDIT, "identity"))]  # fmt: skip
    claim = "images in the instruction help editing"
    made += [Comparison(claim, "edit_only", "text_only", "compute", Task.EDIT, measure)
             for measure in ("l1_inside", "success")]  # fmt: skip
    return made


COMPARISONS = tuple(_comparisons())


class Scores:
    """The scores of a folder's finished runs, by variant, seed, step, task, split and measure."""

    def __init__(self, out: Path):
        lines = read_scores(out)
        if not lines:
            raise AblationError(f"{out} holds no scores: run tools/ablate.py first, or copy scores.jsonl there")
        self.settings = read_settings(out)
        self.mixture, steps = self.settings["data"]["world"], self.settings["train"]["steps"]
        self.steps = [steps * quarter // QUARTERS for quarter in range(1, QUARTERS + 1)]
        whole = finished(lines, self.steps)
        if not whole:
            raise AblationError(f"{out}: no run has all of its {QUARTERS} checkpoints scored")
        self.seeds = {name: sorted(seed for n, seed in whole if n == name) for name in VARIANTS}
        self.samples = {line["step"]: line["samples"] for line in lines}
        names = ("variant", "seed", "step", "kind", "split", "measure")
        self.lines = {tuple(line[name] for name in names): line for line in lines}

    def runs(
        self, variant: str, step: int, task: Task, split: str, measure: str, of: str = "values"
    ) -> np.ndarray | None:
        """Float64 [S, C]: seeds in order, the cases of all kinds of the task; NaN where there is none. None: no run.

        `of`: "values", or the bounds "copy" and "vae".
        """
        rows = []
        for seed in self.seeds[variant]:
            row = []
            for kind in kinds_of(self.mixture, [task]):
                line = self.lines.get((variant, seed, step, kind, split, measure))
                row += [None] * (self.settings["per_kind"] // 2) if line is None or line[of] is None else line[of]
            rows.append(row)
        scores = np.array(rows, dtype=float)
        return None if not rows or np.isnan(scores).all() else scores

    def alike(self, task: Task, split: str, measure: str, steps: Mapping[str, int] = {}) -> list[np.ndarray]:
        """Of every variant scored on this, its runs at the given step, or at the last."""
        found = (self.runs(name, steps.get(name, self.steps[-1]), task, split, measure) for name in VARIANTS)
        return [runs for runs in found if runs is not None]

    def missing(self) -> list[str]:
        """The variants without a run, and those that lack seeds which others have; in words."""
        every = sorted({seed for seeds in self.seeds.values() for seed in seeds})
        lacking = {name: [seed for seed in every if seed not in seeds] for name, seeds in self.seeds.items()}
        return [f"{VARIANTS[name].label}: {'no run' if not self.seeds[name] else f'not seed {listed(seeds)}'}"
                for name, seeds in lacking.items() if seeds]  # fmt: skip


def listed(seeds: Sequence[int]) -> str:
    """Seeds as words: "0, 1"."""
    return ", ".join(map(str, seeds))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def step_of(scores: Scores, comparison: Comparison) -> int:
    """The step at which b of a comparison is scored."""
    if comparison.equal == "compute":
        return scores.steps[-1]
    part = share(scores.mixture, VARIANTS[comparison.b].trains)
    return scores.steps[round(part * QUARTERS) - 1]


def compare(scores: Scores, comparison: Comparison, split: str) -> dict | None:
    """A comparison on the cases of a split, as in report.json; None if a variant has no run."""
    c, last = comparison, scores.steps[-1]
    what, higher = (c.task, split, c.measure), c.measure in SHARES
    runs = scores.runs(c.a, last, *what)
    if runs is None:
        return None
    steps = {c.a: last, c.b: last}
    if c.b == "chance":
        other = np.full(runs.shape[1], CHANCE)
    elif c.b == "copy":
        other = scores.runs(c.a, last, *what, of="copy")[0]  # the same for every run
    else:
        steps[c.b] = step_of(scores, c)
        other = scores.runs(c.b, steps[c.b], *what)
    if other is None:
        return None
    found = estimate(runs, other, alike=scores.alike(*what, steps), share=higher)
    seeds = {name: scores.seeds.get(name) for name in (c.a, c.b)}
    both = seeds[c.a] if seeds[c.b] is None else [seed for seed in seeds[c.a] if seed in seeds[c.b]]
    each = {str(seed): _difference(runs[seeds[c.a].index(seed)],
                                   other if other.ndim == 1 else other[seeds[c.b].index(seed)])
            for seed in both}  # fmt: skip
    entry = {**vars(c), "split": split, "steps": steps, "mean": found.mean, "low": found.low, "high": found.high}
    entry |= {"cases": found.cases, "seeds": seeds, "of_each_seed": each, "over_seeds": found.over_seeds}
    entry["verdict"] = found.verdict(higher) + ("" if found.over_seeds else " (1 seed)")
    return entry | {"sentence": _sentence(entry)}


def _difference(a_C: np.ndarray, b_C: np.ndarray) -> float:
    return float(np.nanmean(a_C - b_C))


def _sentence(entry: Mapping) -> str:
    """Such as "joint minus edits only at equal samples, success in edits, unseen subjects: +0.050 [...], supported"."""
    equal = "" if entry["b"] in ("chance", "copy") else f" at equal {entry['equal']}"
    what = f"{WORDS[entry['measure']]} in {WORDS[entry['task']]}, {entry['split']} subjects"
    return f"{LABELS[entry['a']]} minus {LABELS[entry['b']]}{equal}, {what}: {interval_text(entry)}, {entry['verdict']}"


def interval_text(entry: Mapping, sign: str = "+") -> str:
    """Mean and interval: of shares to 3 digits, of L1 errors to 4."""
    form = f"{sign}.{3 if entry['measure'] in SHARES else 4}f"
    mean, low, high = (format(entry[name], form).replace("-", "−") for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def score_entries(scores: Scores) -> list[dict]:
    """Every variant's mean of every measure at every checkpoint, with interval, seeds and bounds."""
    entries = []
    for task, measures in MEASURED.items():
        for measure in measures:
            for name in VARIANTS:
                for step in scores.steps:
                    for split in ("unseen", "seen"):
                        entries += _score_entry(scores, name, step, task, split, measure)
    return entries


def _score_entry(scores: Scores, name: str, step: int, task: Task, split: str, measure: str) -> list[dict]:
    runs = scores.runs(name, step, task, split, measure)
    if runs is None:
        return []
    alike = scores.alike(task, split, measure, dict.fromkeys(VARIANTS, step))
    found: Estimate = estimate(runs, None, alike=alike, share=measure in SHARES)
    entry = {"variant": name, "step": step, "samples": scores.samples[step], "task": task, "split": split}
    entry |= {"measure": measure, "mean": found.mean, "low": max(0.0, found.low), "high": found.high}
    entry["cases"] = found.cases
    entry |= {"seeds": scores.seeds[name], "of_each_seed": np.nanmean(runs, axis=1).tolist()}
    entry["over_seeds"] = found.over_seeds
    for bound in ("copy", "vae"):
        values = scores.runs(name, step, task, split, measure, of=bound)
        entry[bound] = None if values is None else float(np.nanmean(values))
    return [entry]

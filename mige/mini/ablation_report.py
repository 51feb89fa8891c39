"""What the ablations' scores say: the paper's claims with intervals and verdicts, all scores, curves over samples.

Writes table.md, report.json and curves.png from settings.json and scores.jsonl, however many runs these hold; what is
missing is named.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mige.evaluation.statistics import Estimate, estimate
from mige.mini import bench
from mige.mini.ablation import QUARTERS, VARIANTS, AblationError, finished, kinds_of, read_scores, read_settings, share
from mige.tasks import Task
from mige.utils.files import write_text

CHANCE = 1 / bench.CANDIDATES
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
PAPER = (("full", 0.055), ("without VAE feature fusion", 0.098), ("text-only instructions", 0.170))
SOURCE = "MIGE, arXiv 2502.21291: ablations, L1 on the MagicBrush test set, lower is better"


HOW_TO_READ = (
    "Differences of the first and the second; L1 errors are better when lower. Equal compute: as many steps. Equal "
    "samples: the second where it has seen as many samples of its own tasks as the first at its end. Each 95 % "
    "interval adds up two kinds of chance: that of the cases, each of which is its own control, and that of the seeds, "
    "whose spread is taken to be alike in all variants scored on the measure. '(1 seed)': no variant has two, so the "
    "interval is over cases alone and says nothing of another seed. Supported: the whole interval is on the side of "
    "the claim; contradicted: on the other side; not resolved: it holds 0. Every row stands by itself: of 20 rows "
    "without any effect, one is expected to leave 0 out."
)


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
        return [f"{VARIANTS[name].label}: {'no run' if not self.seeds[name] else f'not seed {_some(seeds)}'}"
                for name, seeds in lacking.items() if seeds]  # fmt: skip


def _some(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def step_of(scores: Scores, comparison: Comparison) -> int:
    """The step at which b of a comparison is scored."""
    if comparison.equal == "compute":
        return scores.steps[-1]
    part = share(scores.mixture, VARIANTS[comparison.b].trains)
    return scores.steps[round(part * QUARTERS) - 1]


def compare(scores: Scores, comparison: Comparison, split: str) -> dict | None:
    """A comparison on the cases of a split, as it stands in report.json; None if a variant has no run."""
    c, last = comparison, scores.steps[-1]
    what, higher = (c.task, split, c.measure), c.measure in bench.SHARES
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
    return f"{LABELS[entry['a']]} minus {LABELS[entry['b']]}{equal}, {what}: {_interval(entry)}, {entry['verdict']}"


def _interval(entry: Mapping, sign: str = "+") -> str:
    """Mean and interval: of shares to 3 digits, of L1 errors to 4."""
    form = f"{sign}.{3 if entry['measure'] in bench.SHARES else 4}f"
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
    found: Estimate = estimate(runs, None, alike=alike, share=measure in bench.SHARES)
    entry = {"variant": name, "step": step, "samples": scores.samples[step], "task": task, "split": split}
    entry |= {"measure": measure, "mean": found.mean, "low": max(0.0, found.low), "high": found.high}
    entry["cases"] = found.cases
    entry |= {"seeds": scores.seeds[name], "of_each_seed": np.nanmean(runs, axis=1).tolist()}
    entry["over_seeds"] = found.over_seeds
    for bound in ("copy", "vae"):
        values = scores.runs(name, step, task, split, measure, of=bound)
        entry[bound] = None if values is None else float(np.nanmean(values))
    return [entry]


# ---- the files -------------------------------------------------------------------------------------------------------


def write(out: Path) -> tuple[Path, list[str]]:
    """Write out/table.md, out/report.json and out/curves.png; returns the table's path and what it says of unseen
    subjects, a sentence a comparison, with what is missing.

    Raises AblationError without scores or if they contradict each other, ImportError without matplotlib.
    """
    scores = Scores(out)
    compared = [(c, [compare(scores, c, split) for split in ("unseen", "seen")]) for c in COMPARISONS]
    entries, missing = score_entries(scores), scores.missing()
    facts = {"complete": not missing, "missing": missing, "settings": scores.settings}
    facts |= {"comparisons": [entry for _, pair in compared for entry in pair if entry is not None]}
    facts |= {"scores": entries, "paper": {"source": SOURCE, "numbers": dict(PAPER)}}
    draw_curves(scores, entries, out / "curves.png")
    write_text(out / "report.json", json.dumps(facts, indent=1) + "\n")
    write_text(out / "table.md", "\n".join(_table(scores, compared, entries)) + "\n")
    sentences = [entry["sentence"] for entry in facts["comparisons"] if entry["split"] == "unseen"]
    return out / "table.md", [*sentences, *(f"incomplete: {words}" for words in missing)]


def _table(scores: Scores, compared: Sequence, entries: Sequence[Mapping]) -> list[str]:
    settings, last = scores.settings, scores.steps[-1]
    seeds = sorted({seed for some in scores.seeds.values() for seed in some})
    lines = ["# Ablations of MIGE-mini", ""]
    if missing := scores.missing():
        lines += [f"**Incomplete.** {'; '.join(missing)}.", ""]
    lines += [
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({_some(seeds)}), {last} steps, "
        f"{scores.samples[last]:,} samples a run; {settings['per_kind'] // 2} cases of each kind and split, "
        f"{settings['sampler_steps']} sampler steps, {settings['precision']}.",
        "",
        "## The claims",
        "",
        HOW_TO_READ,
        "",
        "| claim | difference of | measure | seeds | unseen subjects | verdict | seen subjects | verdict |",
        "|---|---|---|---|---|---|---|---|",
        *(_claim_row(c, *pair) for c, pair in compared),
        "",
        "## All scores at the end of the runs",
        "",
        "Copied: the image to edit, given back. VAE: the right answer through the VAE, the bound of all models.",
        "",
        "| task | measure | variant | seeds | unseen subjects | seen subjects | copied, unseen | VAE, unseen |",
        "|---|---|---|---|---|---|---|---|",
        *_score_rows(entries, last),
        "",
        "## The paper's numbers",
        "",
        f"{SOURCE}. Photographs at 512 px and the full model: what can be compared is the direction.",
        "",
        "| model | L1 |",
        "|---|---|",
        *(f"| {name} | {value:.3f} |" for name, value in PAPER),
    ]
    return lines


def _claim_row(comparison: Comparison, unseen: Mapping | None, seen: Mapping | None) -> str:
    c = comparison
    equal = "" if c.b in ("chance", "copy") else f", equal {c.equal}"
    cells = [c.claim, f"{LABELS[c.a]} − {LABELS[c.b]}{equal}", f"{WORDS[c.task]}: {WORDS[c.measure]}"]
    known = unseen or seen
    cells.append("-" if known is None else " / ".join(str(len(some)) for some in known["seeds"].values() if some))
    for entry in (unseen, seen):
        cells += ["-", "not run"] if entry is None else [_interval(entry), entry["verdict"]]
    return f"| {' | '.join(cells)} |"


def _score_rows(entries: Sequence[Mapping], last: int) -> list[str]:
    rows = []
    at_end = {(e["task"], e["measure"], e["variant"], e["split"]): e for e in entries if e["step"] == last}
    for (task, measure, name, split), unseen in at_end.items():
        if split == "unseen":
            seen = at_end.get((task, measure, name, "seen"))
            cells = [WORDS[task], WORDS[measure], LABELS[name], str(len(unseen["seeds"]))]
            cells += [_interval(unseen, ""), "-" if seen is None else _interval(seen, "")]
            cells += ["-" if unseen[bound] is None else f"{unseen[bound]:.3f}" for bound in ("copy", "vae")]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


# ---- curves ----------------------------------------------------------------------------------------------------------

PANELS = ((Task.SUBJECT, "identity"), (Task.EDIT, "success"), (Task.SUBJECT_EDIT, "identity"), (Task.EDIT, "l1_inside"))
STYLES = {  # colours of Okabe and Ito, told apart by the colour-blind; and by line and mark
    "joint": ("#000000", "-", "o"),
    "subject_only": ("#0072B2", "--", "s"),
    "edit_only": ("#D55E00", "--", "^"),
    "without_subject_edit": ("#009E73", "-.", "D"),
    "without_vae_features": ("#CC79A7", ":", "v"),
    "text_only": ("#E69F00", "-.", "P"),
}


RING = "as many samples of the task as joint at its end"


def draw_curves(scores: Scores, entries: Sequence[Mapping], path: Path) -> None:
    """Draw score against samples on unseen subjects: a panel a measure, a line a variant, a band over its seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # extra: pip install 'mige[ablation]'
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes, handles = figure.subplots(2, 2).flat, {}
    for axis, (task, measure) in zip(axes, PANELS, strict=True):
        rows = [e for e in entries if (e["task"], e["measure"], e["split"]) == (task, measure, "unseen")]
        for name in VARIANTS:
            if own := [e for e in rows if e["variant"] == name]:
                handles[LABELS[name]] = _draw_line(axis, name, own)
        _draw_baseline(axis, measure, rows)
        better = "higher" if measure in bench.SHARES else "lower"
        axis.set_title(f"{WORDS[task]}: {WORDS[measure]} ({better} is better)", fontsize=11, loc="left")
        axis.set_xlabel("samples of all tasks, thousands")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for comparison in COMPARISONS:
        _ring(axes, scores, entries, comparison, handles)
    order = sorted(handles, key=[*LABELS.values(), RING].index)
    how = {"loc": "outside lower center", "ncols": 3, "frameon": False, "fontsize": 10, "handlelength": 3.5}
    figure.legend([handles[label] for label in order], order, **how)
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    most = max(len(seeds) for seeds in scores.seeds.values())
    band = "lines are means over seeds, bands reach from the lowest to the highest" if most > 1 else "1 seed, no band"
    figure.suptitle(f"Unseen subjects; {band}", fontsize=11)
    tmp = path.with_name(f".{path.name}.part")
    figure.savefig(tmp, format="png")
    tmp.replace(path)


def _draw_line(axis, name: str, rows: Sequence[Mapping]):
    colour, line, mark = STYLES[name]
    x = [row["samples"] / 1000 for row in rows]
    low, high = ([end(row["of_each_seed"]) for row in rows] for end in (min, max))
    if len(rows[0]["seeds"]) > 1:
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    [drawn] = axis.plot(x, [row["mean"] for row in rows], color=colour, linestyle=line, marker=mark, markersize=5)
    return drawn


def _draw_baseline(axis, measure: str, rows: Sequence[Mapping]) -> None:
    """Chance or the input copied, as a grey line with its name."""
    copied = [row["copy"] for row in rows if row["copy"] is not None]
    if measure == "identity":
        value, name = CHANCE, WORDS["chance"]
    elif copied:
        value, name = copied[0], WORDS["copy"]
    else:
        return
    axis.axhline(value, color="0.45", linewidth=1, linestyle=(0, (1, 2)))
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate(name, (0, value), (4, 3), color="0.35", fontsize=9, **place)  # no line starts before a quarter


def _ring(axes, scores: Scores, entries: Sequence[Mapping], comparison: Comparison, handles: dict) -> None:
    """Ring the checkpoint that is compared with the joint run's end at equal samples."""
    c = comparison
    if c.equal != "samples" or (c.task, c.measure) not in PANELS:
        return
    axis, step = axes[PANELS.index((c.task, c.measure))], step_of(scores, c)
    key = (c.b, step, c.task, c.measure, "unseen")
    for e in entries:
        if (e["variant"], e["step"], e["task"], e["measure"], e["split"]) == key:
            [ring] = axis.plot(e["samples"] / 1000, e["mean"], "o", markersize=13, markerfacecolor="none", color="0.3")
            handles[RING] = ring

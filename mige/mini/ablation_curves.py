"""Curves of the ablations' scores over samples, drawn with matplotlib (extra "ablation")."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from mige.mini.ablation import VARIANTS
from mige.mini.ablation_comparisons import CHANCE, COMPARISONS, LABELS, WORDS, Comparison, Scores, step_of
from mige.mini.bench_measures import SHARES
from mige.tasks import Task
from mige.utils.files import write_bytes

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
        better = "higher" if measure in SHARES else "lower"
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
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    write_bytes(path, drawn.getbuffer())


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

"""What the ablations' scores say: the paper's claims with intervals and verdicts, all scores, curves over samples.

Writes table.md, report.json and curves.png from settings.json and scores.jsonl, however many runs these hold; what is
missing is named.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mige.mini.ablation_comparisons import (
    COMPARISONS,
    LABELS,
    WORDS,
    Comparison,
    Scores,
    compare,
    interval_text,
    listed,
    score_entries,
)
from mige.mini.ablation_curves import draw_curves
from mige.utils.files import write_text

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
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({listed(seeds)}), {last} steps, "
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
        cells += ["-", "not run"] if entry is None else [interval_text(entry), entry["verdict"]]
    return f"| {' | '.join(cells)} |"


def _score_rows(entries: Sequence[Mapping], last: int) -> list[str]:
    rows = []
    at_end = {(e["task"], e["measure"], e["variant"], e["split"]): e for e in entries if e["step"] == last}
    for (task, measure, name, split), unseen in at_end.items():
        if split == "unseen":
            seen = at_end.get((task, measure, name, "seen"))
            cells = [WORDS[task], WORDS[measure], LABELS[name], str(len(unseen["seeds"]))]
            cells += [interval_text(unseen, ""), "-" if seen is None else interval_text(seen, "")]
            cells += ["-" if unseen[bound] is None else f"{unseen[bound]:.3f}" for bound in ("copy", "vae")]
            rows.append(f"| {' | '.join(cells)} |")
    return rows

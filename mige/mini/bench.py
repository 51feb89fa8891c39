"""The mini-bench: fixed cases of the miniature world that no training sees, generated and measured, and their table."""

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from mige.data.synthetic.cases import SEED, BenchCase, make_cases
from mige.data.synthetic.scenes import Scenes, draw
from mige.data.synthetic.world import SECOND
from mige.diffusion.settings import WORLD, Sampling, resolve
from mige.evaluation.statistics import t_interval, wilson
from mige.inference.pipeline import MIGEPipeline
from mige.mini import bench2_measures
from mige.mini.bench2_measures import MEASURES
from mige.mini.bench_measures import SHARES, measure
from mige.models.vae import decode, encode, scale
from mige.tasks import Task
from mige.utils import images
from mige.utils.errors import UserError
from mige.utils.files import append_json_lines, folder_lock, json_lines, read_json_lines, read_json_object, write_text
from mige.utils.progress import Progress

_ID = re.compile(r"[a-z0-9_]+-\w+-\d+")
VERSIONS = ("model", "vae", "copy")  # the model's images, the answers through its VAE, the images to edit as given


# ---- table -----------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping], version: str = "model") -> list[dict]:
    """Rows of cases.jsonl -> one of the table for each kind, split (seen, unseen ..., all) and measure that there is.

    Low and high are None where there is no interval, of one L1 error. A case with two references has a mean identity of
    0, 1/2 or 1; its interval counts cases, which is the wider one.
    """
    table = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for split in (*dict.fromkeys(row["split"] for row in rows), "all"):
            chosen = [row.get(version, {}) for row in rows if row["kind"] == kind and split in (row["split"], "all")]
            for name in MEASURES:
                if values := [scores[name] for scores in chosen if name in scores]:
                    low, high = wilson(sum(values), len(values)) if name in SHARES else t_interval(values)
                    mean = sum(values) / len(values)
                    entry = {"kind": kind, "split": split, "measure": name, "n": len(values)}
                    table.append(entry | {"mean": mean, "low": low, "high": high})
    return table


# ---- a run -----------------------------------------------------------------------------------------------------------


class BenchError(UserError, RuntimeError):
    """A run that cannot start; the message says why and what to do."""


def run(
    pipeline: MIGEPipeline,
    chosen: Sequence[BenchCase],
    out: Path,
    *,
    model: str,
    batch: int = 16,
    steps: int | None = None,
    guidance: float | None = None,
    source_guidance: float | None = None,
    bench_seed: int = SEED,
) -> list[dict]:
    """Generate and measure the cases that `out` has not finished; return the rows of all of them, in order.

    Steps and guidance are by default a few-step student's own, else 20 and 2, the source's 1.
    Every image becomes out/images/ID.png, then its case a line of out/cases.jsonl. Raises BenchError if `out` holds a
    run with other settings, ValueError for a batch size below 1 and a guidance that the model does not take.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    how = resolve(pipeline.scheduler.config, Task.EDIT, steps, guidance, source_guidance, WORLD)  # alike for all tasks
    (out / "images").mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        settings = {"model": os.path.normpath(model), "bench_seed": bench_seed, "steps": how.steps}
        settings |= {"guidance": how.guidance, "source_guidance": how.source_guidance}
        _settle(out / "settings.json", settings)
        done, errors = _finished(out)
        for error in errors:
            print(f"warning: {error}; its case is made again", file=sys.stderr)
        write_text(out / "cases.jsonl", json_lines(done.values()))
        todo = [one for one in chosen if one.id not in done]
        pipeline.set_progress_bar_config(disable=True)
        with Progress(total=len(todo), unit="case", desc="mini-bench", disable=not todo) as bar:
            for part in _batches(todo, batch):
                rows = _answer(pipeline, part, out, how)
                append_json_lines(out / "cases.jsonl", rows)
                done |= {row["id"]: row for row in rows}
                bar.update(len(part))
        return [done[one.id] for one in chosen]


def _settle(path: Path, settings: Mapping) -> None:
    """Write the settings of a new run, or see that an old one has the same."""
    try:
        there = read_json_object(path)
    except FileNotFoundError:
        pass
    except ValueError as error:
        if finished(path.parent):
            problem = "without it nobody knows what made the finished cases"
            raise BenchError(f"{error}; {problem}: restore it, or use another folder") from error
    else:
        if differing := [f"{k}: {there.get(k)} there, {v} now" for k, v in settings.items() if there.get(k) != v]:
            raise BenchError(f"{path.parent} holds a run with other settings ({'; '.join(differing)}): use another one")
    write_text(path, json.dumps(settings, indent=2) + "\n")


def finished(out: Path) -> dict[str, dict]:
    """The rows of out/cases.jsonl by id, without a last line that was cut and without those that lost their image."""
    return _finished(out)[0]


def _finished(out: Path) -> tuple[dict[str, dict], list[str]]:
    """Also what is there but does not count, a sentence each."""
    found, errors = read_json_lines(out / "cases.jsonl")
    rows = {}
    for number, row in found:
        where, name = f"{out / 'cases.jsonl'}, line {number}", row.get("id")
        whole = all(isinstance(row.get(key), str) for key in ("kind", "split")) and isinstance(row.get("model"), dict)
        if not isinstance(name, str) or not _ID.fullmatch(name) or not whole:
            errors.append(f"{where}: no row of a case")
            continue
        try:
            images.open_image(out / "images" / f"{name}.png")
            rows[name] = row
        except images.BadImageError as error:
            errors.append(f"{where}: {error}")
    return rows, errors


def all_finished(out: Path) -> tuple[list[BenchCase], list[dict]]:
    """The cases that `out` has finished, of earlier calls too, and their rows, in the benchmark's order."""
    done = finished(out)
    largest = max((int(name.rsplit("-", 1)[1]) for name in done), default=0)
    there = [one for one in make_cases(2 * (largest + 1)) if one.id in done]
    return there, [done[one.id] for one in there]


def _batches(chosen: Sequence[BenchCase], batch: int) -> Iterator[list[BenchCase]]:
    """At most `batch` cases of one task and shape at a time."""
    for task, shape in itertools.product(Task, dict.fromkeys(one.shape for one in chosen)):
        same = [one for one in chosen if one.case.task is task and one.shape == shape]
        yield from (same[first : first + batch] for first in range(0, len(same), batch))


@torch.no_grad()
def _answer(pipeline: MIGEPipeline, part: Sequence[BenchCase], out: Path, how: Sampling) -> list[dict]:
    """Generate one batch, save its images, measure them and the two bounds."""
    device = pipeline._execution_device
    drawn = [draw(Scenes.stack([one.case.target, *one.case.references]), device, one.shape, one.world) for one in part]
    references = [images.to_pil(pixels[1:]) if len(pixels) > 1 else [] for pixels in drawn]
    sources = [None if one.case.source is None else p[one.case.source] for one, p in zip(part, references, strict=True)]
    height, width = part[0].shape
    made = pipeline(
        [one.case.prompt for one in part],
        references,
        sources,
        height=height,
        width=width,
        num_inference_steps=how.steps,
        guidance_scale=how.guidance,
        source_guidance_scale=how.source_guidance,
        seed=[one.seed for one in part],
    ).images
    targets = torch.stack([pixels[0] for pixels in drawn])
    moments = encode(pipeline.vae, targets)
    restored = decode(pipeline.vae, scale(pipeline.vae, moments.mean)).float()
    rows = []
    for i, one in enumerate(part):
        images.save_image(made[i], out / "images" / f"{one.id}.png")
        source = None if one.case.source is None else drawn[i][1 + one.case.source]
        shown = [images.to_pixels(made[i]).to(device), restored[i], *([] if source is None else [source])]
        if one.world == SECOND:
            scores = bench2_measures.measure(one.case, one.shape, torch.stack(shown), targets[i], source)
        else:
            scores = measure(one.case, torch.stack(shown), targets[i], source)
        row = {"id": one.id, "kind": one.case.kind, "split": one.split, "prompt": one.case.prompt, "seed": one.seed}
        rows.append(row | dict(zip(VERSIONS, scores, strict=False)))
    return rows

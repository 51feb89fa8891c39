"""Cases of the synthetic world as ordinary records and images on the disk."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from mige.data.synthetic import tasks
from mige.data.synthetic.scenes import Scenes, draw
from mige.data.synthetic.world import FIRST, World
from mige.utils import images
from mige.utils.progress import Progress

_CHUNK = 64  # cases drawn together


def write(
    folder: Path,
    seed: int,
    cases: range,
    subjects: tuple[int, ...],
    mixture: dict[str, float],
    *,
    augment: bool,
    world: World = FIRST,
) -> Counter:
    """Records and square images of these cases of a world; returns how many there are of each kind."""
    (folder / "images").mkdir()
    counts = Counter()
    bar = Progress(total=len(cases), unit="case", desc="world")
    with bar, (folder / "records.jsonl").open("w", encoding="utf-8") as output:
        for first in range(0, len(cases), _CHUNK):
            numbers = cases[first : first + _CHUNK]
            rngs = {n: np.random.default_rng([seed, n]) for n in numbers}
            made = {n: tasks.sample(rng, subjects, mixture, augment=augment, world=world) for n, rng in rngs.items()}
            names, scenes = [], []
            for number, case in made.items():
                row = _record(number, case)
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
                names += [row["image"], *row["entity_path"]]
                scenes += [case.target, *case.references]
                counts[case.kind] += 1
            for name, image in zip(names, images.to_pil(draw(Scenes.stack(scenes), world=world)), strict=True):
                image.save(folder / name)
            bar.update(len(numbers))
    return counts


def _record(number: int, case: tasks.Case) -> dict:
    """The official fields; the id begins with the kind."""
    stem = f"{case.kind}-{number:07d}"
    references = [f"images/{stem}-reference{i}.png" for i in range(len(case.references))]
    return {
        "id": stem,
        "multi_prompt": case.prompt,
        "entity_path": references,
        "source_path": [] if case.source is None else [references[case.source]],
        "image": f"images/{stem}.png",
    }

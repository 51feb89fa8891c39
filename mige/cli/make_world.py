"""Write the miniature world to disk: ordinary records and pictures, for the ordinary trainer and for `infer.py`.

    python tools/make_world.py output/world --cases 10000
    python tools/make_world.py output/world_unseen --cases 200 --unseen --kinds one_reference replace_by_reference

makes OUT/records.jsonl and OUT/images/ (PNG, 128 px). Case N depends on the seed, the kinds and N alone, so a larger
set begins with the smaller one. Most subjects of a reference are invented, as in training, but with --unseen.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mige.data.synthetic import sprites, tasks
from mige.data.synthetic.scenes import Scenes, draw
from mige.utils import images
from mige.utils.files import whole_folder

_AT_ONCE = 64  # cases drawn together
_KINDS = [kind for kind in tasks.KINDS if kind != "text_to_image"]  # a record has a reference


def write(
    folder: Path, seed: int, cases: range, subjects: tuple[int, ...], mixture: dict[str, float], *, invent: bool
) -> Counter:
    """Records and pictures of these cases; returns how many there are of each kind."""
    (folder / "images").mkdir()
    counts = Counter()
    with (folder / "records.jsonl").open("w", encoding="utf-8") as output:
        for first in tqdm(range(0, len(cases), _AT_ONCE), unit=f"x {_AT_ONCE} cases"):
            numbers = cases[first : first + _AT_ONCE]
            made = {
                n: tasks.sample(np.random.default_rng([seed, n]), subjects, mixture, invent=invent) for n in numbers
            }
            names, scenes = [], []
            for number, case in made.items():
                row = _record(number, case)
                output.write(json.dumps(row, ensure_ascii=False) + "\n")
                names += [row["image"], *row["entity_path"]]
                scenes += [case.target, *case.references]
                counts[case.kind] += 1
            for name, picture in zip(names, images.to_pil(draw(Scenes.stack(scenes))), strict=True):
                picture.save(folder / name)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT", help="made; must not be there yet")
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unseen", action="store_true", help="about the subjects that training holds out")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, metavar="KIND",
                        help=f"of task, in the shares of training (all): {', '.join(_KINDS)}")  # fmt: skip
    args = parser.parse_args()
    if args.cases < 1 or args.first < 0 or args.seed < 0:
        parser.error(f"--cases is {args.cases}, --first {args.first}, --seed {args.seed}; expected >= 1, >= 0 and >= 0")
    mixture = {kind: tasks.MIXTURE[kind] for kind in args.kinds}
    cases, subjects = range(args.first, args.first + args.cases), sprites.split()[args.unseen]
    try:
        with whole_folder(args.folder) as folder:
            counts = write(folder, args.seed, cases, subjects, mixture, invent=not args.unseen)
    except OSError as error:
        sys.exit(f"error: {error}")
    for kind in args.kinds:
        print(f"{counts[kind]:8d} {kind}")


if __name__ == "__main__":
    main()

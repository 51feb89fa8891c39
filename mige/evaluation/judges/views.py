"""Which images a judge is shown of a record, how they are called, and at what size.

The sizes are the official ones: GEdit-Bench scales the result to its source's size, DreamBench++ shows 512 x 512,
OmniContext scales inputs down to 1024 x 1024 px of area. Everything else is shown as it is, down to that area.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mige.evaluation.judges.rubrics import Question
from mige.reports.cases import MARKER
from mige.utils.images import open_image

MAX_AREA = 1024 * 1024  # px of an image that is shown
CELL = 16  # px that both sides of a scaled input are a multiple of

Shown = list[tuple[str, Image.Image]]
"""Images with what the prompt calls them, the result last."""


def show(benchmark: str, row: Mapping[str, Any], output: Path) -> Shown:
    """The images of a record and its result; raises BadImageError."""
    made = open_image(output)
    if row.get("task") == "edit" or "instruction" in row:
        source = _within(open_image(Path(row["score"]["source"])))
        made = made.resize(source.size, Image.Resampling.BICUBIC) if benchmark == "gedit" else _within(made)
        return [("the source image", source), ("the edited image", made)]
    numbered = row["score"]["references"] if benchmark == "omnicontext" else row["entity_path"]
    inputs = [open_image(Path(path)) for path in numbered]
    if benchmark == "dreambench_plus":
        inputs, made = (
            [image.resize((512, 512), Image.Resampling.BICUBIC) for image in some] for some in (inputs, [made])
        )
        return [("the reference image", inputs[0]), ("the generated image", made[0])]
    inputs, made = [_within(image) for image in inputs], _within(made)
    if row["source_path"]:
        names = [
            "the source image" if path in row["source_path"] else "the reference image" for path in row["entity_path"]
        ]
        return [*zip(names, inputs, strict=True), ("the edited image", made)]
    names = [f"reference image {n}" for n in range(1, len(inputs) + 1)] if len(inputs) > 1 else ["the reference image"]
    return [*zip(names, inputs, strict=True), ("the generated image", made)]


def instruction(row: Mapping[str, Any]) -> str:
    """What was asked for, in words for a judge: a benchmark's own, or the prompt with the images' names in it."""
    if own := row["score"].get("instruction"):
        return own
    if "instruction" in row:  # Emu Edit's layout
        return row["instruction"]
    if not row["source_path"]:
        return row["score"]["caption"]
    first, *rest = MARKER.split(row["multi_prompt"])
    names = ["the source image" if path in row["source_path"] else "the reference image" for path in row["entity_path"]]
    text = first + "".join(f" {name} {part}" for name, part in zip(names, rest, strict=False))
    text = re.sub(r"\s+([,.;:!?])", r"\1", " ".join(text.split()))
    return re.sub(r"\b(?:an?|the|this) (the (?:source|reference) image)", r"\1", text, flags=re.IGNORECASE)


def for_question(shown: Shown, question: Question, swapped: bool) -> Shown:
    """What a question is asked about: all images or the result alone; swapped, the result comes first."""
    if question.sees == "output":
        return [(name.replace("edited", "generated"), image) for name, image in shown[-1:]]
    return [shown[-1], *shown[:-1]] if swapped else shown


def _within(image: Image.Image) -> Image.Image:
    """The image, scaled down to the greatest area that is shown if it is larger; sides are then multiples of 16."""
    area = image.width * image.height
    if area <= MAX_AREA:
        return image
    scale = math.sqrt(MAX_AREA / area)
    width, height = (max(CELL, int(side * scale) // CELL * CELL) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)

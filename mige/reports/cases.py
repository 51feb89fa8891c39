"""What a report shows: cases, each with what went in, what was asked for, and what came out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mige.utils.images import as_image

ImageSource = Image.Image | Path

MARKER = re.compile("<imagehere>", re.IGNORECASE)
TASK_NAMES = {
    "subject": "Subject-driven generation",
    "edit": "Instruction-based editing",
    "subject_edit": "Subject-driven editing",
}


@dataclass(frozen=True)
class Case:
    """One row of a report: what went in, what was asked for, what came out.

    `inputs` are (label, image) pairs. An image labelled "source" is not part of the text; the others are the
    references, and the k-th `<imagehere>` of the instruction means the k-th of them. `beside` are shown beside the
    output, such as ("truth", image).
    """

    title: str
    task: str
    instruction: str
    inputs: tuple[tuple[str, ImageSource], ...]
    output: ImageSource
    detail: str
    beside: tuple[tuple[str, ImageSource], ...] = ()
    made_by: str = "output"  # the label of the output on a page


def require_cases(cases: Sequence[Case]) -> None:
    """Raise ValueError where there is nothing to show."""
    if not cases:
        raise ValueError("got no cases, expected at least one: a report shows the records of a run that made images")


def load(image: ImageSource) -> Image.Image:
    """The image of a case, through the one door; raises BadImageError."""
    return as_image(image)


def fit(image: Image.Image, side: int, *, enlarge: bool = False) -> Image.Image:
    """Scale an image into a square without distortion; one that is smaller grows only if asked to."""
    scale = side / max(image.size)
    if scale == 1 or (scale > 1 and not enlarge):
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)

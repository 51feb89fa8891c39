"""A mask as it is painted on the page: strokes of a round brush over image 1, in parts of its sides.

No pixels are sent: the mask is drawn here, at the size of the image it belongs to, whatever the size it was shown at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from mige.web.instructions import RefusedError

MAX_STROKES = 400
MAX_POINTS = 6000  # of all strokes
MAX_RADIUS = 0.5


@dataclass(frozen=True)
class Stroke:
    """One movement of the brush."""

    radius: float  # in parts of the image's longer side, above 0
    points: tuple[tuple[float, float], ...]  # in parts of its width and height, from the upper left corner, 0 .. 1


def read_strokes(value: Any) -> tuple[Stroke, ...]:
    """The strokes of a list as the page sends it, [[radius, x, y, x, y, ...], ...]; none for None.

    Raises RefusedError for anything else, and for more of them than anybody paints.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, list) for one in value):
        raise RefusedError("The mask is no list of strokes: paint it again.")
    if len(value) > MAX_STROKES or sum(map(len, value)) > 2 * MAX_POINTS + MAX_STROKES:
        raise RefusedError(f"The mask has more than {MAX_STROKES} strokes or {MAX_POINTS} points: paint a simpler one.")
    return tuple(map(_read_stroke, value))


def as_lists(strokes: Sequence[Stroke]) -> list[list[float]]:
    """The strokes as `read_strokes` reads them."""
    return [[stroke.radius, *(part for point in stroke.points for part in point)] for stroke in strokes]


def draw(strokes: Sequence[Stroke], size: tuple[int, int]) -> Image.Image:
    """The mask, mode "L": 255 where a stroke goes, else 0; `size`: width and height of its image, px."""
    mask, longer = Image.new("L", size), max(size)
    pen = ImageDraw.Draw(mask)
    for stroke in strokes:
        radius = max(stroke.radius * longer, 0.5)
        points = [(x * size[0], y * size[1]) for x, y in stroke.points]
        if len(points) > 1:
            pen.line(points, fill=255, width=max(1, round(2 * radius)))
        for x, y in points:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _read_stroke(value: list[Any]) -> Stroke:
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1 for one in value):
        raise RefusedError("The mask holds what is no number from 0 to 1: paint it again.")
    if len(value) < 3 or len(value) % 2 == 0 or not 0 < value[0] <= MAX_RADIUS:
        raise RefusedError("The mask holds a stroke without a radius or without points: paint it again.")
    radius, *parts = map(float, value)
    return Stroke(radius, tuple(zip(parts[::2], parts[1::2], strict=True)))

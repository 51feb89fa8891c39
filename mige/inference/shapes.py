"""What size an output has: as its source, as the model was trained, or as the caller says."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from mige.inference.sizes import SizeGrid
from mige.tasks import Task

SOURCE, NATIVE = "source", "native"
_ASPECT, _SIDES = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})"), re.compile(r"([1-9]\d{0,5})[xX×]([1-9]\d{0,5})")
_RATIO_COUNTS = 8  # how much worse another ratio is than another area, in logarithms
_AREA_MAY_BE_OFF = 0.2  # in logarithms


@dataclass(frozen=True)
class Shape:
    """The size of an output, px, and how its source is fitted to it."""

    height: int
    width: int
    whole: bool = False  # the whole source is scaled to it; else its centre is cut out

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, px."""
        return self.height, self.width


@dataclass(frozen=True)
class SizeWish:
    """What a caller asks for; raises ValueError where it contradicts itself or is none of these.

    Attributes:
        size: "source": an edit has its source's aspect ratio and the area of the native size, anything else the native
            size; "native": the square that the model was trained on; "3:2": this aspect ratio (width : height), the
            area of the native size; "768x512": width and height, px.
        height, width: px, in place of `size`; the native side for the one that is None.
        long_side: px that the longer side has at most, where `size` leaves it open.
    """

    size: str = SOURCE
    height: int | None = None
    width: int | None = None
    long_side: int | None = None

    def __post_init__(self):
        is_known = isinstance(self.size, str) and (self.size in (SOURCE, NATIVE) or self._aspect or self._sides)
        if not is_known:
            raise ValueError(f"size is {self.size!r}, expected 'source', 'native', an aspect ratio such as '3:2', "
                             "or width and height in px such as '768x512'")  # fmt: skip
        if self.long_side is not None and (self.size == NATIVE or self._sides or self._explicit):
            raise ValueError(f"long_side is {self.long_side}, but the size is given too: leave one of them out")
        if self._explicit and self.size != SOURCE and self.size != NATIVE:
            raise ValueError(f"size is {self.size!r}, but height or width is given too: leave one of them out")

    @property
    def _explicit(self) -> bool:
        return self.height is not None or self.width is not None

    @property
    def _aspect(self) -> re.Match[str] | None:
        return _ASPECT.fullmatch(self.size)

    @property
    def _sides(self) -> re.Match[str] | None:
        return _SIDES.fullmatch(self.size)

    @property
    def follows_source(self) -> bool:
        """Whether outputs of edits differ in size as their sources do."""
        return self.size == SOURCE and not self._explicit

    def arguments(self) -> dict[str, Any]:
        """The arguments of a call that wish the same: `size` is None where height or width takes its place."""
        return asdict(self) | {"size": None if self._explicit else self.size}

    def shape(self, grid: SizeGrid, source: tuple[int, int] | None) -> Shape:
        """The shape of one output.

        Args:
            grid: the model's sizes. source: width and height of the image to edit, px; None where there is none.

        Raises ValueError for a size off the grid.
        """
        if self._explicit or self.size == NATIVE:
            return Shape(*grid.resolve(self.height, self.width))
        if sides := self._sides:
            return Shape(*grid.resolve(int(sides[2]), int(sides[1])))
        if aspect := self._aspect:
            return Shape(*closest(grid, int(aspect[1]), int(aspect[2]), self.long_side))
        width, height = source or (1, 1)
        return Shape(*closest(grid, width, height, self.long_side), whole=source is not None)

    def of_task(self, grid: SizeGrid, task: Task, source: tuple[int, int] | None) -> Shape:
        """The same for a sample; a subject's output follows no source."""
        return self.shape(grid, None if task is Task.SUBJECT else source)


def closest(grid: SizeGrid, width: int, height: int, long_side: int | None = None) -> tuple[int, int]:
    """Height and width on the grid, px, of about this ratio and the native area.

    long_side: px that the longer one has at most, in place of the area. The ratio counts more than the area, of which a
    fifth may be missing or too much. Raises ValueError for a long side shorter than the grid's step.
    """
    if width < height:
        return closest(grid, height, width, long_side)[::-1]
    ratio, step = width / height, grid.step
    if long_side is not None:
        if long_side < step:
            raise ValueError(f"long_side is {long_side}, expected at least {step} px")
        return max(step, round(long_side // step / ratio) * step), long_side // step * step
    area = grid.native**2 // step**2
    short, options = math.sqrt(area / ratio), []
    for rows in range(max(1, math.floor(short * 0.8)), math.ceil(short * 1.2) + 1):
        for columns in (math.floor(rows * ratio), math.ceil(rows * ratio)):
            columns = min(max(1, columns), area)
            off_ratio, off_area = abs(math.log(columns / rows / ratio)), abs(math.log(rows * columns / area))
            options.append((off_area > _AREA_MAY_BE_OFF, _RATIO_COUNTS * off_ratio + off_area, rows, columns))
    *_, rows, columns = min(options)
    return rows * step, columns * step


def wish_of(size: Any, height: int | None, width: int | None, long_side: int | None) -> SizeWish:
    """The wish of a call's arguments, None for those that are not given; errors as `SizeWish`."""
    if size is None:
        size = SOURCE
    elif height is not None or width is not None:
        raise ValueError(f"size is {size!r}, but height or width is given too: leave one of them out")
    return SizeWish(size, height, width, long_side)

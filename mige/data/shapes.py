"""The shapes of training's images: heights and widths, px, of which a micro-batch has one."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mige.config import DataConfig
from mige.data.records import Issue, Record
from mige.utils.images import BadImageError, image_size


@dataclass(frozen=True)
class ShapedRecords:
    """Which record is shown in which shape.

    Attributes:
        sizes: height and width of the images of each shape, px.
        of_sets: of each set, its records' shapes as places in `sizes`, int8 [records].
        block: samples in a row of one shape.
    """

    sizes: Sequence[tuple[int, int]]
    of_sets: Sequence[np.ndarray]
    block: int


def image_sizes(data: DataConfig, step: int) -> tuple[tuple[int, int], ...]:
    """Height and width of every shape that a training shows, px; of a square alone where the config names none.

    step: px of a patch along one side (16).
    """
    return tuple((rows * step, columns * step) for rows, columns in data.shapes) or ((data.size, data.size),)


def nearest_shapes(images: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The shape of each image: the one whose aspect ratio is the least factor away, the first of equals; int8 [images].

    images: widths and heights, px, more than 0. sizes: heights and widths of the shapes.
    """
    wide, high = np.asarray(images, dtype=float).reshape(-1, 2).T
    rows, columns = np.asarray(sizes, dtype=float).T
    away = np.abs(np.log(wide / high)[:, None] - np.log(columns / rows))
    return away.argmin(axis=1).astype(np.int8)


def read_target_sizes(records: Iterable[Record], sizes: dict[Path, tuple[int, int]]) -> list[Issue]:
    """Add width and height, px, of the targets that `sizes` lacks, by their files' headers, read in threads.

    Returns a fatal issue for each record whose target is no image.
    """
    records = [record for record in records if record.target is not None]
    unknown = list(dict.fromkeys(record.target for record in records if record.target not in sizes))
    with ThreadPoolExecutor(16) as pool:  # network file systems answer slowly, but many at once
        found: Mapping[Path, tuple[int, int] | BadImageError] = dict(
            zip(unknown, pool.map(_size, unknown), strict=True)
        )
    bad = {path: one for path, one in found.items() if isinstance(one, BadImageError)}
    sizes.update({path: one for path, one in found.items() if path not in bad})
    return [
        Issue(record.where, f"{record.target}: {bad[record.target].message}", bad[record.target].hint)
        for record in records
        if record.target in bad
    ]


def _size(path: Path) -> tuple[int, int] | BadImageError:
    try:
        return image_size(path)
    except BadImageError as error:
        return error

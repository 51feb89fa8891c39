"""What training shows the VAE of a record: which images, and by whose shape each is cropped."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from mige.data.records import Record


class Crop(NamedTuple):
    """The centre of an image, in training's shape, mostly a square; of a pair, the same part of both.

    Without `like` the image is scaled by its own shape to cover training's, and its centre is kept
    (`images.center_crop`; of a square that is the official crop). With `like`, the path of another image, it is scaled
    to the very shape that that one is scaled to, and the same part is kept: what lies at one relative place in both
    files comes to lie at one pixel, and an image of another ratio is stretched. Images of one ratio are scaled to one
    shape anyway, so for them both crops are equal, bit for bit.
    """

    path: Path
    like: Path | None = None

    def __str__(self) -> str:
        return str(self.path) if self.like is None else f"{self.path} (cropped like {self.like})"


def training_crops(record: Record) -> list[Crop]:
    """The target, then the references in order; the source is cropped like the target, which the record must have."""
    likes = (record.target if path == record.source else None for path in record.references)
    return [Crop(record.target), *map(Crop, record.references, likes)]


def as_crops(images: Iterable[Path | Crop]) -> list[Crop]:
    """Paths become crops by their own shape."""
    return [image if isinstance(image, Crop) else Crop(image) for image in images]

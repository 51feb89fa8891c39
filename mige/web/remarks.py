"""What the header of an upload tells before a run: that it is no image, or looks other to the model than to a visitor.

Pixels are decoded when a run's turn comes, and no sooner.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mige.utils.foreign_files import FORMATS, is_heif
from mige.utils.images import DAMAGED

SHOWN = {"AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "WEBP"}
"""Formats that browsers show."""


def remarks(pictures: Sequence[Path | None]) -> list[str]:
    """A remark for every picture that has one, without a full stop."""
    said = [(number, _remark(path)) for number, path in enumerate(pictures, start=1) if path is not None]
    return [f"Picture {number} {words}" for number, words in said if words]


@functools.lru_cache(maxsize=1024)
def _remark(path: Path) -> str | None:
    if is_heif(path):
        return "is a HEIC file, which few browsers show; the model may read it all the same"
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.has_transparency_data:
                return "is transparent in places: the model reads those as black"
            return (
                None if image.format in SHOWN else f"is a {image.format} file, which browsers do not show; it is read"
            )
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning, *DAMAGED):
        return "is no image that can be read: use another"

"""Images as they are scored: a file as it is, fitted to what the model makes, or saved as the official scripts save."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mige.utils.images import as_image, center_crop, letterbox, open_image

JPEG_QUALITY = 75
"""Pillow's own, with which all three official inference scripts save."""


@dataclass(frozen=True)
class View:
    """What is scored of a file.

    Attributes:
        size: width and height in px that it is fitted to as the model is shown it: what a model that copies its input
            would give back. None: its own.
        letterboxed: fitted whole on black, as a subject's image is; else scaled and cropped, as an edit's source is.
        jpeg: through JPEG of quality 75 once more.
    """

    path: Path
    size: tuple[int, int] | None = None
    letterboxed: bool = False
    jpeg: bool = False

    def open(self) -> Image.Image:
        """The RGB image. Raises BadImageError for a file that cannot be read."""
        image = open_image(self.path)
        if self.size is not None and image.size != self.size:
            fit = letterbox if self.letterboxed else center_crop
            image = fit(image, self.size[1], self.size[0])
        if self.jpeg:
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=JPEG_QUALITY)
            image = as_image(Image.open(encoded))
        return image

    def key(self) -> str:
        """64 hexadecimal digits of what is shown: of a file as it is, the SHA-256 of the file."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.size is not None or self.jpeg:
            digest.update(f"{self.size} {self.letterboxed} {self.jpeg and JPEG_QUALITY}".encode())
        return digest.hexdigest()

"""What checking the records of a run has read of them already, so that running reads nothing twice."""

import threading
from pathlib import Path

from PIL import Image

from mige.data.records import Record
from mige.inference.samples import Sample
from mige.models.instruction import Instruction
from mige.utils.images import image_size, open_image
from mige.utils.masks import as_mask

MAX_BYTES = 2**30
"""Opened images that are kept, in bytes of their pixels; further ones are opened again when their turn comes."""

_PIXEL = 4  # bytes of a pixel in PIL's memory, RGB too


class OpenedRecords:
    """Images by path and instructions by record: each read once, those of checking kept for the run.

    Images are kept as they come until they fill `max_bytes`.
    """

    def __init__(self, *, ignore_profiles: bool = False, max_bytes: int = MAX_BYTES):
        self.ignore_profiles, self.free = ignore_profiles, max_bytes
        self.instructions: dict[Record, Instruction] = {}
        self.whole: set[Record] = set()  # those whose source is not cut
        self._images: dict[Path, Image.Image] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def image(self, path: Path) -> Image.Image:
        """The image of a file, 8-bit sRGB; from any thread. Raises BadImageError for one that cannot be used."""
        if (kept := self._images.get(path)) is not None:
            return kept
        image = open_image(path, ignore_profiles=self.ignore_profiles)
        size = image.width * image.height * _PIXEL
        with self._lock:
            self._sizes[path] = image.size
            if path not in self._images and size <= self.free:
                self._images[path], self.free = image, self.free - size
        return image

    def size(self, path: Path) -> tuple[int, int]:
        """Width and height of an image, px, by its header where it was not opened yet; errors as `image_size`."""
        return self._sizes.get(path) or image_size(path)

    def sample(self, record: Record) -> Sample:
        """A record's prompt with its images; the source is the same object as its reference."""
        opened = {path: self.image(path) for path in dict.fromkeys(record.references)}
        source = None if record.source is None else opened[record.source]
        return Sample(
            record.task,
            record.prompt,
            tuple(opened[path] for path in record.references),
            source,
            record.edit_type,
            self.instructions.get(record),
            record in self.whole,
            None if record.mask is None else as_mask(record.mask, source.size),
        )

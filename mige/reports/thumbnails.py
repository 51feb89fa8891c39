"""Images beside a page: thumbnails made once for each file, links to images that lie in the page's folder already."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from mige.reports.cases import ImageSource, fit, load
from mige.utils.images import image_size, save_image

SIDE = 512
_NAME = re.compile(r"([0-9a-f]{16})-(\d+)x(\d+)\.(?:jpg|png)")


@dataclass(frozen=True)
class Shown:
    """An image as a page shows it: where it lies relative to the page, its size in pixels."""

    link: str
    width: int
    height: int


class Thumbnails:
    """A folder of small copies beside a page. Args: suffix: ".jpg", or ".png" without loss; side: None for no limit."""

    def __init__(self, folder: Path, suffix: str = ".jpg", side: int | None = SIDE):
        self.folder, self.suffix, self.side = folder, suffix, side
        there = (_NAME.fullmatch(path.name) for path in folder.glob("*")) if folder.is_dir() else ()
        self.known = {found[1]: Shown(f"{folder.name}/{found[0]}", int(found[2]), int(found[3]))
                      for found in there if found}  # fmt: skip

    def show(self, image: ImageSource) -> Shown:
        """The copy of an image: of a file that has not changed since, the one that is there; it is not opened then.

        Raises BadImageError, with the path, for a file that cannot be shown.
        """
        if isinstance(image, Image.Image):
            return self._kept(f"{image.size} {image.mode}".encode() + image.tobytes(), lambda: load(image))
        try:
            status = Path(image).stat()
        except OSError:
            return self._kept(b"", lambda: load(image))  # raises with the reason
        known = f"{os.path.realpath(image)} {status.st_size} {status.st_mtime_ns}"
        return self._kept(known.encode(errors="surrogateescape"), lambda: load(image))

    def _kept(self, identity: bytes, opened: Callable[[], Image.Image]) -> Shown:
        key = hashlib.sha256(f"{self.side} ".encode() + identity).hexdigest()[:16]
        if key not in self.known:
            image = opened() if self.side is None else fit(opened(), self.side)
            name = f"{key}-{image.width}x{image.height}{self.suffix}"
            self.folder.mkdir(parents=True, exist_ok=True)
            save_image(image, self.folder / name, **({"quality": 92} if self.suffix == ".jpg" else {}))
            self.known[key] = Shown(f"{self.folder.name}/{name}", image.width, image.height)
        return self.known[key]


class Outputs:
    """Results: linked where they lie inside the page's folder, else copied without loss."""

    def __init__(self, folder: Path):
        self.root, self.copies = folder.resolve(), Thumbnails(folder / "outputs", ".png", side=None)

    def show(self, image: ImageSource) -> Shown:
        """Raises BadImageError, with the path, for a file that cannot be shown."""
        if isinstance(image, Image.Image):
            return self.copies.show(image)
        inside = Path(image).resolve()
        if not inside.is_relative_to(self.root):
            return self.copies.show(image)
        return Shown(quote(inside.relative_to(self.root).as_posix()), *image_size(inside))

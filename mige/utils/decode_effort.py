"""Files of few bytes and few pixels that would take minutes or gigabytes to decode.

The number of pixels bounds what a decoder does, but for these: a progressive JPEG goes over all of them once a scan; a
GIF's comments and those of a plain PPM are joined by copying; every tag of a TIFF or of EXIF data may claim the whole
file as its value, and a strip of a TIFF may be a byte.
"""

import io
import re
from pathlib import Path
from typing import IO

from PIL import TiffImagePlugin

from mige.utils.bad_image import BadImageError

HEAD = 2**18  # bytes of a JPEG in which its first scan usually begins
MAX_SCANS = 200  # of a JPEG: encoders make some ten
MAX_COMMENTS = 10_000  # blocks of 255 bytes in a GIF, lines in a plain PPM
MAX_STRIPS = 2**18  # or tiles of a TIFF

_SAVE_AGAIN = "save it again as PNG or JPEG"
_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # of a JPEG, but for those inside of a scan's data
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))


def check_effort(path: Path) -> None:
    """Raise BadImageError for an image file that takes far more work than its pixels; TIFF and EXIF: `_load`."""
    with path.open("rb") as file:
        head = file.read(8)
        if head.startswith(b"\xff\xd8"):
            start = head + file.read(HEAD)
            scans = _count_scans(start)
            if scans != 1:  # none yet, or more that the rest of the file may hold
                scans = _count_scans(start + file.read())
            number, limit, what = scans, MAX_SCANS, "scans"
        elif head.startswith((b"GIF87a", b"GIF89a")):
            number, limit, what = _count_gif_comments(file), MAX_COMMENTS, "blocks of comments"
        elif re.match(rb"P[123]\s", head):
            number, limit, what = (head + file.read()).count(b"#"), MAX_COMMENTS, "comments"
        else:
            return
    if number > limit:
        raise BadImageError(path, f"more than {limit:,} {what}, which take long to decode", _SAVE_AGAIN)


def _count_scans(data: bytes) -> int:
    """Scans of the first image of a JPEG, at most MAX_SCANS + 1; exactly 1 where libjpeg decodes it in one go."""
    scans, place, components = 0, 2, 0
    while scans <= MAX_SCANS and (marker := _MARKER.search(data, place)):
        kind, place = marker[1][0], marker.end()
        if kind == 0xD9:
            break
        if kind in (0x01, 0xD8):  # these two have no length
            continue
        if kind in _FRAMES and not components:
            components = data[place + 7] if place + 7 < len(data) else 0
            components += kind in _PROGRESSIVE  # never done in one scan
        if kind == 0xDA:
            scans += 1
            if scans == 1 and data[place + 2 : place + 3] == bytes([components]):
                return 1
        place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return max(scans, 2) if scans else 0


def _count_gif_comments(file: IO[bytes]) -> int:
    """Blocks in the comments before the first image of a GIF, whose first eight bytes have been read."""
    flags = file.read(5)[2:3] or b"\0"
    if flags[0] & 0x80:
        file.seek(3 * 2 << (flags[0] & 7), io.SEEK_CUR)
    blocks = 0
    while blocks <= MAX_COMMENTS and (introducer := file.read(1)) and introducer != b",":
        if introducer != b"!":
            continue
        is_comment = file.read(1) == b"\xfe"
        while blocks <= MAX_COMMENTS and (size := file.read(1)) and size != b"\0":
            file.seek(size[0], io.SEEK_CUR)
            blocks += is_comment
    return blocks


class _Counted:
    """A file of which no more may be read than it has: the values of honest tags lie beside each other.

    RuntimeError, as Pillow passes ValueError by and goes on without the tags.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.tell, self.seek = file, file.tell, file.seek
        here = file.tell()
        self.left = file.seek(0, io.SEEK_END) + 2**16
        file.seek(here)

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise RuntimeError("its tags claim more bytes than it has")
        return data


_read_directory = TiffImagePlugin.ImageFileDirectory_v2.load


def _load(self: TiffImagePlugin.ImageFileDirectory_v2, file: IO[bytes]) -> None:
    """Pillow's reading of the tags of TIFF and of EXIF in every format, within the size of the file."""
    _read_directory(self, _Counted(file))
    for tag in (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.TILEOFFSETS):
        if len(self._tagdata.get(tag, b"")) > 8 * MAX_STRIPS:
            raise RuntimeError(f"more than {MAX_STRIPS:,} strips or tiles")


TiffImagePlugin.ImageFileDirectory_v2.load = _load  # Pillow has no setting for it, and reads tags while it opens a file

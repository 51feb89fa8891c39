"""The one door for images: whatever holds an image, an upright 8-bit sRGB image comes out, or a BadImageError.

Fitting and tensors (`pixels.py`) are handed on from here; `colour.py` knows modes, depths and profiles.
"""

import hashlib
import io
import stat
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from mige.utils.arrays import from_array, from_tensor, is_tensor
from mige.utils.bad_image import MAX_PIXELS, BadImageError, check_size
from mige.utils.colour import to_rgb
from mige.utils.decode_effort import check_effort
from mige.utils.files import write_bytes
from mige.utils.foreign_files import FORMATS, is_heif, unknown_file
from mige.utils.path_hints import path_hint
from mige.utils.pixels import (
    CLIP_MEAN,
    CLIP_STD,
    center_crop,
    check_shape,
    covering,
    letterbox,
    pixels_of,
    squeeze,
    to_levels,
    to_pil,
    to_pixels,
    vision_levels,
    vision_pixels,
    vision_pixels_of,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "FORMATS",
    "MAX_PIXELS",
    "BadImageError",
    "as_image",
    "center_crop",
    "check_shape",
    "covering",
    "image_key",
    "image_size",
    "letterbox",
    "open_image",
    "pixels_of",
    "save_image",
    "squeeze",
    "to_levels",
    "to_pil",
    "to_pixels",
    "vision_levels",
    "vision_pixels",
    "vision_pixels_of",
]

# What Pillow's decoders let through for damaged data, besides OSError; RuntimeError is AVIF's.
DAMAGED = (
    *(ValueError, RuntimeError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)


def as_image(
    value: "str | Path | Image.Image | np.ndarray | Tensor",
    *,
    ignore_profiles: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """`value` as an 8-bit RGB image: upright by its EXIF orientation, in sRGB, transparency on black.

    value: the path of a file; a PIL image of any mode, which stays as it is; an array [H, W] or [H, W, C], uint8,
      uint16 or float in [0, 1]; a tensor [C, H, W] or [1, C, H, W], uint8 or float in [0, 1]
      as in diffusers, not [-1, 1].
    ignore_profiles: take the numbers of a file or PIL image as sRGB whatever its colour profile, as the official code.
    max_pixels: more are refused, before they are decoded.
    Raises BadImageError (a ValueError) for what cannot be used and TypeError for anything else. Equal images give equal
    results: compare them with `==` or by `image_key`.
    """
    if isinstance(value, str | Path):
        return open_image(Path(value), ignore_profiles=ignore_profiles, max_pixels=max_pixels)
    if isinstance(value, Image.Image):
        return _from_pil(value, ignore_profiles, max_pixels)
    if isinstance(value, np.ndarray):
        return to_rgb("array", from_array(value, max_pixels))
    if is_tensor(value):
        return to_rgb("tensor", from_tensor(value, max_pixels))
    expected = "expected a path, a PIL image, a NumPy array or a torch tensor"
    raise TypeError(f"{type(value).__name__} is no image: {expected}")


def open_image(path: Path, *, ignore_profiles: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in `path` as a fully decoded RGB 8-bit image in sRGB, turned upright by its EXIF orientation.

    Transparency is put on black, as the official entity crops are; grey of 12 and 16 bits is scaled to 8 bits, not
    clipped; of an animation the first frame counts. Raises BadImageError for a missing, unreadable, empty, damaged,
    truncated or oversized (more than `max_pixels`) file, for a file that is no image (saying what it is), and for
    pixels without a fixed range. Warns (UserWarning) of a colour profile that cannot be used.
    """
    _check_file(path)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global that other libraries switch on; it would turn loss into grey
    try:
        check_effort(path)
        with Image.open(path, formats=_formats(path)) as image:
            check_size(path, image.size, max_pixels)
            with _decoding(image.width * image.height):
                return _upright_rgb(path, image, ignore_profiles)
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(path, str(error), "make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise unknown_file(path) from error
    except PermissionError as error:
        raise BadImageError(path, "permission denied", "make the file readable") from error
    except (OSError, *DAMAGED) as error:
        raise BadImageError(path, f"cannot be decoded ({error})", "the file is damaged: replace it") from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of the upright image in `path`, px, by its header; the same as `open_image(path).size`.

    A PNG is decoded for it where it is not square, as its orientation may come after the pixels. Raises BadImageError
    for what is no image.
    """
    _check_file(path)
    try:
        check_effort(path)
        with Image.open(path, formats=_formats(path)) as image:
            check_size(path, image.size)
            if image.format == "PNG" and image.width != image.height:
                with _decoding(image.width * image.height):
                    image.load()
            # Of a TIFF Pillow gives the upright size, but keeps the tag until the image is decoded.
            turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
            return image.size[::-1] if turned else image.size
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise unknown_file(path) from error
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning, *DAMAGED) as error:
        raise BadImageError(path, f"cannot be read ({error})", "replace the file") from error


def image_key(image: Image.Image) -> bytes:
    """A digest of size and pixels of a result of `as_image`: two of the same key are the same image."""
    return hashlib.sha256(b"%d %d " % image.size + image.tobytes()).digest()


def _from_pil(image: Image.Image, ignore_profiles: bool, max_pixels: int) -> Image.Image:
    filename = getattr(image, "filename", "")
    name = f"PIL image of mode {image.mode}" + (f" ({filename})" if filename else "")
    check_size(name, image.size, max_pixels)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # as in `open_image`
    try:
        image.load()
        return _upright_rgb(name, image, ignore_profiles)
    except BadImageError:
        raise
    except (OSError, *DAMAGED) as error:
        raise BadImageError(name, f"cannot be decoded ({error})", "open it again, or replace the file") from error


def _upright_rgb(name: Path | str, image: Image.Image, ignore_profiles: bool) -> Image.Image:
    """A new image; `image` stays as it is. Turned last, when it takes least memory, and in one step."""
    image.load()
    # Asked only now: PNG may keep its tags behind the pixels, and Pillow turns a TIFF itself and drops the tag.
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    rgb = to_rgb(name, image, ignore_profiles)
    if orientation in range(2, 9):
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
        rgb.info.clear()
    return rgb


def _formats(path: Path) -> tuple[str, ...]:
    """FORMATS, and HEIC for a file that is one where pillow-heif is installed."""
    if not is_heif(path):
        return FORMATS
    try:
        import pillow_heif
    except ImportError:
        return FORMATS  # the file stays unknown, and the message names what to install
    pillow_heif.register_heif_opener(thumbnails=False)
    return (*FORMATS, "HEIF")


_room = threading.Condition()
_held = 0  # pixels being decoded by all threads


@contextmanager
def _decoding(pixels: int) -> Iterator[None]:
    """Wait until the images decoded at once have MAX_PIXELS together: many small ones, or a single large one."""
    global _held
    with _room:
        _room.wait_for(lambda: _held == 0 or _held + pixels <= MAX_PIXELS)
        _held += pixels
    try:
        yield
    finally:
        with _room:
            _held -= pixels
            _room.notify_all()


def _check_file(path: Path) -> None:
    """Refuse what is no file with something in it; a pipe, for one, would block forever."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        hint = path_hint(path) or "correct the path or fetch the image"
        raise BadImageError(path, "no such file", hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path, or one the locale cannot spell
        hint = path_hint(path) if isinstance(error, UnicodeError) else None
        message = f"cannot be opened ({error})"
        raise BadImageError(path, message, hint or "correct the path or its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise BadImageError(path, f"is {kind}", "give the path of an image")
    if status.st_size == 0:
        raise BadImageError(path, "the file is empty (0 bytes)", "fetch the image again")


def save_image(image: Image.Image, path: Path, **params: Any) -> None:
    """Write `image` whole or not at all, in the format of the suffix; `params` go to PIL's encoder.

    A file that was there before survives any failure. Raises ValueError for an unknown suffix and OSError, with the
    path in its message, where writing fails.
    """
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use one such as .png, .jpg or .webp")
    # Encoded in memory first: Pillow's own file writing loses the reason (no space left) of a failure.
    encoded = io.BytesIO()
    image.save(encoded, format=formats[path.suffix.lower()], **params)
    write_bytes(path, encoded.getbuffer())

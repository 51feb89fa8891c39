"""Pictures: opening them safely, fitting them, and the way between PIL images and tensors.

`open_image` is the one door for files: whatever a file holds, an 8-bit RGB picture comes out, or a BadImageError that
names the file. Colour profiles are ignored, as in the official code. Resampling is torchvision's and PIL's.
"""

import io
import os
import secrets
import stat
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from mige.utils.errors import UserError
from mige.utils.files import sync_folder

if TYPE_CHECKING:  # torch and torchvision load where tensors are made: checking records needs neither
    from torch import Tensor

MAX_PIXELS = 178_956_970  # 512 MiB as RGB, where Pillow's own limit refuses; a 108-megapixel photograph still passes
# Only what Pillow decodes itself: EPS, for one, would start Ghostscript on a stranger's file. MPO comes as JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow's decoders let through for damaged data, besides OSError; RuntimeError is AVIF's.
DAMAGED = (
    *(ValueError, RuntimeError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError),
    *(struct.error, zlib.error),
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class BadImageError(UserError, ValueError):
    """A picture that cannot be used: which one, what is wrong and what to do."""

    def __init__(self, picture: Path | str, problem: str, remedy: str):
        super().__init__(picture, problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return "{}: {}; {}".format(*self.args)


def open_image(path: Path) -> Image.Image:
    """The picture in `path` as a fully decoded RGB 8-bit image, turned upright by its EXIF orientation.

    Transparency is put on black, as the official entity crops are; 16-bit grey is scaled to 8 bits, not clipped; of an
    animation the first frame counts. Raises BadImageError for a missing, unreadable, empty, damaged, truncated or
    oversized (more than MAX_PIXELS) file, for a file that is no picture, and for pixels without a fixed range.
    """
    _check_file(path)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global that other libraries switch on; it would turn loss into grey
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_size(path, image.size)
            return _to_rgb(path, ImageOps.exif_transpose(image))
    except BadImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError(path, str(error), "make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError(path, "not a picture of a known format", f"use one of {', '.join(FORMATS)}") from error
    except PermissionError as error:
        raise BadImageError(path, "permission denied", "make the file readable") from error
    except (OSError, *DAMAGED) as error:
        raise BadImageError(path, f"cannot be decoded ({error})", "the file is damaged: replace it") from error


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bilinear, antialiased) to cover height x width, then cut out the centre; the mode is kept.

    For a square this is torchvision's Resize(size) + CenterCrop(size), bit for bit. Raises BadImageError where the
    picture is so long that its scaled form would exceed MAX_PIXELS.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    if image.width * height >= image.height * width:
        covering = (height, int(height * image.width / image.height))
    else:
        covering = (int(width * image.height / image.width), width)
    _check_size(f"picture of {image.width} x {image.height} scaled to cover {width} x {height}", covering)
    return F.center_crop(F.resize(image, covering, InterpolationMode.BILINEAR), (height, width))


def letterbox(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale (bicubic) the whole picture to fit height x width, centred on black; RGB in and out."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    if image.width * height >= image.height * width:
        fitting = (max(1, int(width * image.height / image.width)), width)
    else:
        fitting = (height, max(1, int(height * image.width / image.height)))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(
        F.resize(_require_rgb(image), fitting, InterpolationMode.BICUBIC),
        ((width - fitting[1]) // 2, (height - fitting[0]) // 2),
    )
    return canvas


def to_pixels(image: Image.Image) -> "Tensor":
    """RGB image -> float32 [3, H, W] in [-1, 1]. Raises ValueError for any other mode."""
    from torchvision.transforms import functional as F

    return F.to_tensor(_require_rgb(image)) * 2 - 1


def vision_pixels(image: Image.Image, size: int) -> "Tensor":
    """RGB image -> float32 [3, size, size], normalised for the vision tower; squeezed to a square (bicubic).

    Raises ValueError for any other mode.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    squeezed = F.resize(_require_rgb(image), (size, size), InterpolationMode.BICUBIC)
    return F.normalize(F.to_tensor(squeezed), CLIP_MEAN, CLIP_STD)


def to_pil(pixels: "Tensor") -> list[Image.Image]:
    """Float [B, 3, H, W], clamped to [-1, 1] -> B RGB images, rounded to the nearest of 256 levels.

    Raises ValueError for another shape and for pixels that are NaN or infinite.
    """
    import torch

    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels of shape {tuple(pixels.shape)}, expected [B, 3, H, W]")
    finite = pixels.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"pictures {bad} of {len(pixels)} hold NaN or infinite pixels; decode in a wider precision")
    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def save_image(image: Image.Image, path: Path, **params: Any) -> None:
    """Write `image` whole or not at all, in the format of the suffix; `params` go to PIL's encoder.

    A file that stood there before survives any failure. Raises ValueError for an unknown suffix and OSError, with the
    path in its message, where writing fails.
    """
    formats = Image.registered_extensions()
    if path.suffix.lower() not in formats:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; use one such as .png, .jpg or .webp")
    # Encoded in memory first: Pillow's own file writing loses the reason (no space left) of a failure.
    encoded = io.BytesIO()
    image.save(encoded, format=formats[path.suffix.lower()], **params)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(encoded.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only now
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot save the picture: {error.strerror}", str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _check_file(path: Path) -> None:
    """Refuse what is no file with something in it; a pipe, for one, would block for ever."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise BadImageError(path, "no such file", "correct the path or fetch the picture") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise BadImageError(path, f"cannot be opened ({error})", "correct the path or its permissions") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise BadImageError(path, f"is {kind}", "give the path of a picture")
    if status.st_size == 0:
        raise BadImageError(path, "the file is empty (0 bytes)", "fetch the picture again")


def _check_size(picture: Path | str, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        problem = f"{size[0] * size[1]:,} pixels, expected at most {MAX_PIXELS:,}"
        raise BadImageError(picture, problem, "make it smaller or crop it")


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    """A decoded image of any mode as 8-bit RGB, free of metadata that a later save would carry on."""
    if image.mode == "F":
        raise BadImageError(path, "32-bit float pixels have no fixed range", "save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # I;16, I;16B, I: integers of more than 8 bits
        image = _eight_bits(path, image)
    elif image.has_transparency_data:
        opaque = Image.new("RGB", image.size)
        rgba = image.convert("RGBA")
        opaque.paste(rgba, mask=rgba.getchannel("A"))
        return opaque
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """Grey of 0..65535 -> 0..255, rounded: the inverse of v * 257. PIL's own conversion would clip at 255."""
    values = np.array(image, dtype=np.int64)
    if values.min() < 0 or values.max() > 65535:
        problem = f"pixels from {values.min()} to {values.max()}, expected 0 to 65535"
        raise BadImageError(path, problem, "save it with 8 or 16 bits a channel")
    values[values == image.info.get("transparency", -1)] = 0  # a PNG may name one grey as transparent: black
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"picture of mode {image.mode}, expected RGB; open it with open_image")
    return image

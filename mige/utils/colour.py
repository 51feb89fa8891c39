"""Pixels of any mode, depth and colour profile -> 8-bit sRGB."""

import io
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from mige.utils.bad_image import BadImageError
from mige.utils.declared_colours import declared_profile

EIGHT_OR_SIXTEEN = "save it with 8 or 16 bits a channel"
MAX_PROFILE = 4 * 2**20  # bytes: those of presses have some two million; the ones in use are kept in memory
STRIP_PIXELS = 1 << 20  # of what is worked on in strips: the memory it takes beside the image
_PROFILE_OF = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}


def to_rgb(name: Path | str, image: Image.Image, ignore_profiles: bool = False) -> Image.Image:
    """A decoded image of any mode as a new 8-bit RGB image, free of metadata that a later save would carry on.

    Colours go from the image's profile to sRGB (relative colorimetric); a profile that cannot be used is a warning and
    counts as sRGB. Transparency is put on black. Grey of more than 8 bits is scaled by its depth. Raises BadImageError
    for pixels without a fixed range (float, signed, integers of 32 bits beyond 65535).
    """
    profile = None if ignore_profiles else image.info.get("icc_profile") or declared_profile(image)
    if profile is not None and len(profile) > MAX_PROFILE:
        _warn(name, f"has {len(profile):,} bytes, expected at most {MAX_PROFILE:,}")
        profile = None
    _check_samples(name, image)
    if image.mode.startswith("I"):  # I;16, I;16B, I: integers of more than 8 bits
        return _opaque(name, _eight_bits(name, image), profile)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        return _on_black(name, image, profile)
    return _opaque(name, image, profile)


def _check_samples(name: Path | str, image: Image.Image) -> None:
    if image.mode == "F":
        raise BadImageError(name, "32-bit float pixels have no fixed range", EIGHT_OR_SIXTEEN)
    tags = getattr(image, "tag_v2", {})
    if tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2 and _bits(image) < 32:
        raise BadImageError(name, "signed pixels have no fixed range", f"{EIGHT_OR_SIXTEEN}, unsigned")


def _bits(image: Image.Image) -> int:
    """Bits a sample: TIFF says it, everything else of more than 8 bits comes as 16."""
    return getattr(image, "tag_v2", {}).get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of full width that cover `size`, of some STRIP_PIXELS each."""
    width, height = size
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(height, top + rows)


def _eight_bits(name: Path | str, image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits -> L: 0 .. 2 ** bits - 1 to 0 .. 255, rounded. PIL's conversion would clip at 255."""
    white = 2 ** min(_bits(image), 16) - 1
    inverted = getattr(image, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    clear = image.info.get("transparency")  # a PNG may name one grey as transparent: black
    grey = Image.new("L", image.size)
    for box in _strips(image.size):
        values = np.asarray(image.crop(box)).astype(np.int64)
        if values.min() < 0 or values.max() > white:
            message = f"pixels from {values.min()} to {values.max()}, expected 0 to {white}"
            raise BadImageError(name, message, EIGHT_OR_SIXTEEN)
        if isinstance(clear, int):
            values[values == clear] = 0
        if inverted:
            values = white - values
        grey.paste(Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)), box)
    return grey


def _on_black(name: Path | str, image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours by their own profile, then black shining through: in strips, so that no second RGBA image is made."""
    opaque = Image.new("RGB", image.size)
    for box in _strips(image.size):
        strip = image.crop(box)
        if strip.mode == "LA" and _fits(profile, "L"):
            colours, alpha = strip.getchannel("L"), strip.getchannel("A")
        else:
            rgba = strip.convert("RGBA")
            colours, alpha = rgba.convert("RGB"), rgba.getchannel("A")
        opaque.paste(_opaque(name, colours, profile), box, mask=alpha)
    return opaque


def _opaque(name: Path | str, image: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque 8-bit image of any mode -> RGB, by its profile."""
    if image.mode == "LAB":
        rgb = ImageCms.applyTransform(image, _lab_transform())
    elif profile is None:
        rgb = image.convert("RGB")
    else:
        # A grey or palette image may carry a profile of RGB: it becomes RGB first.
        fits = image.mode == "CMYK" or (image.mode in _PROFILE_OF and _fits(profile, image.mode))
        plain = image if fits else image.convert("RGB")
        transform = _transform(name, profile, plain.mode)
        rgb = plain.convert("RGB") if transform is None else ImageCms.applyTransform(plain, transform)
    rgb.info.clear()
    return rgb


def _fits(profile: bytes | None, mode: str) -> bool:
    try:
        return profile is not None and _opened(profile).profile.xcolor_space == _PROFILE_OF[mode]
    except (OSError, ImageCms.PyCMSError):
        return False


def _transform(name: Path | str, profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes `mode` by `profile` to sRGB; None, after a warning, for a broken or foreign one; None for sRGB."""
    if mode in _PROFILE_OF and _fits(profile, mode):
        try:
            return _built(profile, mode)
        except ImageCms.PyCMSError as error:
            reason = f"cannot be used ({error})"
    else:
        try:
            reason = f"is for {_opened(profile).profile.xcolor_space.strip()}, the pixels are {mode}"
        except (OSError, ImageCms.PyCMSError) as error:
            reason = f"cannot be read ({error})"
    _warn(name, reason)
    return None


def _warn(name: Path | str, reason: str) -> None:
    warnings.warn(f"{name}: the colour profile {reason}; the colours are taken as sRGB", stacklevel=3)


@lru_cache(maxsize=8)
def _opened(profile: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile))


@lru_cache(maxsize=8)
def _built(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    transform = ImageCms.buildTransform(
        _opened(profile), _srgb(), mode, "RGB", intent, ImageCms.Flags.BLACKPOINTCOMPENSATION
    )
    return None if mode == "RGB" and _changes_nothing(transform) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a profile is sRGB under another name: no colour of a lattice moves by more than one level.

    Its pixels then stay as they are, bit for bit.
    """
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    moved = np.asarray(ImageCms.applyTransform(Image.fromarray(lattice), transform))
    return int(np.abs(moved.astype(int) - lattice).max()) <= 1


@lru_cache(maxsize=1)
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(maxsize=1)
def _lab_transform() -> ImageCms.ImageCmsTransform:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return ImageCms.buildTransform(lab, _srgb(), "LAB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC)

"""Colours that a file declares without a profile: PNG's cHRM and gAMA, EXIF's Adobe RGB -> an ICC profile that says so.

A matrix profile by ICC.1:2010, 8.3: the primaries' XYZ under D50 (Bradford's adaptation) and one curve for all three.
"""

import struct
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SRGB = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green, blue
_ADOBE = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # of IEC 61966-2-1, as ICC's function type 3
_USUAL = 0.45455  # gAMA's way of saying the curve of sRGB


def declared_profile(image: Image.Image) -> bytes | None:
    """An ICC profile for what the file of a decoded image declares of its colours; None for nothing but sRGB."""
    exif = image.getexif()
    space = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace)
    interop = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) if space == 0xFFFF else None
    if space == 2 or interop == "R03":  # DCF's optional colour space
        return _profile(_ADOBE, 563 / 256)
    places, gamma = image.info.get("chromaticity"), image.info.get("gamma")
    if "srgb" in image.info or (places is None and gamma is None):
        return None
    power = None if gamma is None or abs(gamma - _USUAL) < 1e-3 else 1 / gamma if gamma > 0 else None
    if places is not None and (len(places) != 8 or min(places[1::2]) <= 0):
        places = None
    return _profile(tuple(places or _SRGB), power)


@lru_cache(maxsize=32)
def _profile(places: tuple[float, ...], power: float | None) -> bytes | None:
    """A profile of these primaries and of the curve x ** power, None: sRGB's. None where they span no colours."""
    if np.allclose(places, _SRGB, atol=1e-3) and power is None:
        return None
    x, y = np.array(places[::2]), np.array(places[1::2])
    white, *columns = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=1)
    primaries = np.array(columns).T
    if abs(np.linalg.det(primaries)) < 1e-6:
        return None
    matrix = primaries * np.linalg.solve(primaries, white)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(_BRADFORD @ _D50 / (_BRADFORD @ white)) @ _BRADFORD @ matrix
    curve = (2.4, *_SRGB_CURVE[1:]) if power is None else (power,)
    kind = 3 if power is None else 0
    trc = b"para" + bytes(4) + struct.pack(">HH", kind, 0) + b"".join(map(_fixed, curve))
    text = b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", 16, 28) + "declared".encode("utf-16-be")
    tags = {b"desc": text, b"cprt": text, b"wtpt": _xyz(_D50), b"rTRC": trc, b"gTRC": trc, b"bTRC": trc}
    tags |= {name: _xyz(column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T, strict=True)}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", start + len(body))
    head = size + bytes(4) + bytes([4, 0x30, 0, 0]) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + _xyz(_D50)[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _fixed(value: float) -> bytes:
    """s15Fixed16Number."""
    return struct.pack(">i", round(float(value) * 65536))

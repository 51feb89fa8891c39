"""The settings of a picture, kept in its PNG file as text and read back from there."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mige
from mige.utils.images import save_image

_KEY = "mige"


def save_with_settings(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that carries `settings` (values that JSON can hold) and, for other programs, what was asked for.

    The texts are "Software", "Description" (the instruction) and "mige" (all settings as JSON, with the version).
    """
    save_image(image, path, pnginfo=_texts(settings))


def png_with_settings(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """The bytes of the file that `save_with_settings` writes."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_texts(settings))
    return file.getvalue()


def _texts(settings: dict[str, Any]) -> PngInfo:
    text = PngInfo()
    text.add_itxt("Software", f"MIGE {mige.__version__}")
    text.add_itxt("Description", settings["instruction"])
    text.add_itxt(_KEY, json.dumps(settings | {"version": mige.__version__}, ensure_ascii=False))
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_with_settings` wrote into a PNG; raises ValueError for a picture that has none."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()  # texts may follow the pixels
        text = image.info.get(_KEY)
    if text is None:
        raise ValueError(f"{path} holds no settings of MIGE: expected a PNG downloaded from its page")
    return json.loads(text)

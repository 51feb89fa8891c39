"""The settings of a picture, kept in its PNG file as text and read back from there."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import mige
from mige.utils.images import save_image

MAX_TEXT = 256 * 1024  # characters of the settings in a file
_KEY, _XMP_KEY = "mige", "XML:com.adobe.xmp"
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 Iptc4xmpExt:DigitalSourceType="{source_type}"/>
</rdf:RDF></x:xmpmeta><?xpacket end="r"?>"""


def save_with_settings(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG that carries `settings` (values that JSON can hold) and, for other programs, what was asked for.

    The texts are "Software", "Description" (the instruction), "mige" (all settings as JSON, with the version), and the
    XMP packet by which other programs know that a model made it (IPTC's Digital Source Type): all of it, or, of an
    edit, a composite.
    """
    save_image(image, path, pnginfo=_texts(settings))


def png_with_settings(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """The bytes of the file that `save_with_settings` writes."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_texts(settings))
    return file.getvalue()


def _texts(settings: dict[str, Any]) -> PngInfo:
    kind = "trainedAlgorithmicMedia" if settings.get("task") == "subject" else "compositeWithTrainedAlgorithmicMedia"
    text = PngInfo()
    text.add_itxt("Software", f"MIGE {mige.__version__}")
    text.add_itxt("Description", settings["instruction"])
    text.add_itxt(_KEY, json.dumps(settings | {"version": mige.__version__}, ensure_ascii=False))
    text.add_itxt(_XMP_KEY, _XMP.format(source_type=_SOURCE_TYPE + kind))
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_with_settings` wrote into a PNG, whoever made the file; no pixel is decoded.

    Raises ValueError for a file that has none, or whose text is no object of JSON, or whose image is too large to open;
    OSError for one that is no PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(_KEY)  # before the pixels, where it is written
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(text, str):
        raise ValueError(f"{path} holds no settings of MIGE: expected a PNG downloaded from its page")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{path} holds settings of {len(text):,} characters: expected at most {MAX_TEXT:,}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds settings that are no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds settings that are no object: expected a PNG downloaded from its page")
    return settings

"""How the second world's subjects were drawn from four emoji sets, each by other hands.

The sets are npm packages (`PACKAGES`), read from the tarballs that `npm pack` writes.
"""

import io
import re
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mige.data.synthetic.draw_sprites import fit
from mige.data.synthetic.styles import CELL, STYLES, subject_list
from mige.utils.files import write_bytes

INK = 176  # the longer side of a subject in its cell, px
DRAWN = 512  # side at which an SVG is drawn before it is fitted, px
MIN_COVER = 0.1  # share of the cell: thinner line drawings are hard to tell apart at 50 px
QUALITY, ALPHA_QUALITY = 78, 60  # of WebP: 3.6 KB a drawing
PACKAGES = {
    "fluent": "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "noto": "svgmoji-noto-3.2.0.tgz",
    "twemoji": "twemoji-svg-15.0.0.tgz",
    "openmoji": "openmoji-17.0.0.tgz",
}
_FILES = {
    "fluent": r"package/assets/(.+)\.webp",
    "noto": r"package/sprites/(all)\.svg",
    "twemoji": r"package/(.+)\.svg",
    "openmoji": r"package/color/svg/(.+)\.svg",
}


def draw_styles(packages: Path, folder: Path) -> dict[str, int]:
    """Write STYLE.zip of every style into `folder`; returns how many drawings each has.

    packages: folder of the tarballs. Raises FileNotFoundError if one is missing, ValueError if a subject of the list
    is drawn in fewer than three styles.
    """
    from resvg_py import svg_to_bytes  # needed here alone

    subjects, counts = subject_list(), dict.fromkeys((code for code, _ in subject_list()), 0)
    made = {}
    for style in STYLES:
        drawings = dict(_drawings(packages / PACKAGES[style], style, svg_to_bytes))
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as output:
            for code, name in subjects:
                if code in drawings and _cover(cell := _fit(drawings[code]())) > MIN_COVER:
                    entry = zipfile.ZipInfo(f"{name}.webp")  # of no date: the same bytes at every call
                    output.writestr(entry, _webp(cell))
                    counts[code] += 1
            made[style] = len(output.namelist())
        write_bytes(folder / f"{style}.zip", archive.getbuffer())
    if few := [name for code, name in subjects if counts[code] < 3]:
        raise ValueError(f"drawn in fewer than three styles: {', '.join(few)}; take them off the list")
    return made


def _drawings(package: Path, style: str, render: Callable) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """Code points, as in the list, and what draws them."""
    with tarfile.open(package) as tar:
        for member in tar:
            if found := re.fullmatch(_FILES[style], member.name):
                data = tar.extractfile(member).read()
                if style == "noto":
                    yield from _sprites(data, render)
                elif style == "fluent":
                    yield _code(found[1]), lambda data=data: Image.open(io.BytesIO(data)).convert("RGBA")
                else:
                    yield _code(found[1]), lambda data=data: _render(data.decode(), render)


def _sprites(data: bytes, render: Callable) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """The drawings of a file that holds all, each an <svg> with its code points as id."""
    for one in ET.fromstring(data):
        if code := one.get("id"):
            yield _code(code), lambda one=one: _render(ET.tostring(one, encoding="unicode"), render)


def _code(name: str) -> str:
    """Code points without variation selectors, which the sets write or leave out."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _render(svg: str, render: Callable) -> Image.Image:
    return Image.open(io.BytesIO(bytes(render(svg_string=svg, width=DRAWN, height=DRAWN)))).convert("RGBA")


def _fit(drawing: Image.Image) -> Image.Image:
    """The drawing, cut to its ink, in the middle of its cell."""
    ink = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    return fit(drawing.crop(ink), CELL, INK)


def _cover(cell: Image.Image) -> float:
    return float(np.asarray(cell.getchannel("A"), dtype=np.float32).mean() / 255)


def _webp(cell: Image.Image) -> bytes:
    output = io.BytesIO()
    cell.save(output, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6)
    return output.getvalue()

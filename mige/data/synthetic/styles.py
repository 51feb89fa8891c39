"""The second world's subjects: some 740 names, each drawn by up to four hands, at 192 px.

A *drawing* is a name in a style; its number is the place in `drawings()`. The files beside this (`drawings/`) are made
by tools/draw_sprites.py and ship with the project; each style has a licence of its own, see drawings/LICENCES.md.

Letters: N drawings, h and w pixels of a cell.
"""

import functools
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CELL = 192
STYLES = ("fluent", "noto", "twemoji", "openmoji")
"""The first is the one that a name alone asks for."""
UPTO = (
    24.0,
    48.0,
)  # sides of subjects, in 128ths of an image, up to which they are drawn from a cell of 48 and of 96 px
_FOLDER = Path(__file__).parent / "drawings"
_UNSEEN_NAMES, _UNSEEN_DRAWINGS = 80, 160


@functools.cache
def subject_list() -> tuple[tuple[str, str], ...]:
    """(code points of the emoji, name) of every subject, chosen by hand."""
    lines = (_FOLDER / "subjects.tsv").read_text(encoding="utf-8").splitlines()
    return tuple((code, name) for code, name in (line.split("\t") for line in lines))


@functools.cache
def drawings() -> tuple[tuple[str, str], ...]:
    """(name, style) of every drawing, by its number: a style after the other, names as listed."""
    there = {style: set(_archive(style).namelist()) for style in STYLES}
    return tuple((name, style) for style in STYLES for _, name in subject_list() if f"{name}.webp" in there[style])


@functools.cache
def names() -> tuple[str, ...]:
    """What each drawing shows, by its number."""
    return tuple(name for name, _ in drawings())


@functools.cache
def split() -> dict[str, tuple[int, ...]]:
    """Numbers of drawings by what training shows of them, a fixed random choice.

    "unseen_names": no drawing of the name is ever shown. "unseen_drawings": one style of the name is not, the others
    are (never the first style, in which names are learnt). "seen": all others.
    """
    rng, known = np.random.default_rng(0), [name for _, name in subject_list()]
    order = [known[i] for i in rng.permutation(len(known))]
    unseen_names, rest = set(order[:_UNSEEN_NAMES]), order[_UNSEEN_NAMES:]
    kept_back = {}
    for name in rest[:_UNSEEN_DRAWINGS]:
        styles = [style for style in STYLES[1:] if (name, style) in set(drawings())]
        kept_back[name] = styles[int(rng.integers(len(styles)))]
    halves = {"seen": [], "unseen_names": [], "unseen_drawings": []}
    for number, (name, style) in enumerate(drawings()):
        half = "unseen_names" if name in unseen_names else "seen"
        halves["unseen_drawings" if kept_back.get(name) == style else half].append(number)
    return {half: tuple(numbers) for half, numbers in halves.items()}


@functools.cache
def named() -> tuple[int, ...]:
    """Drawings that an instruction may bring in by their names: of the seen ones those in the first style."""
    return tuple(number for number in split()["seen"] if drawings()[number][1] == STYLES[0])


@functools.cache
def known() -> frozenset[int]:
    """Drawings whose names training teaches, whether it shows that drawing or not."""
    return frozenset(split()["seen"] + split()["unseen_drawings"])


def sample(level: int, numbers: Tensor) -> Tensor:
    """Drawings, float32 [N, 4, h, w] in [0, 1], colours times alpha, on the device of `numbers` (int64 [N]).

    level: 0, 1 and 2 for cells of 48, 96 and 192 px. On a CPU only what is asked for is read; another device holds all.
    """
    if numbers.device.type == "cpu":
        cells = torch.stack([_levels(number)[level] for number in numbers.tolist()])
    else:
        cells = _tables(numbers.device)[level][numbers]
    return cells.float() / 255


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, ...]:
    """All drawings on a device, level by level, uint8 [N, 4, h, w]: 27, 106 and 424 MB."""
    with ThreadPoolExecutor(8) as pool:
        levels = zip(*pool.map(_read, range(len(drawings()))), strict=True)
        return tuple(torch.stack(cells).to(device) for cells in levels)


@functools.lru_cache(maxsize=512)  # 100 MB
def _levels(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """`_read`, kept for a while: scenes are drawn again and again about the same subjects."""
    return _read(number)


def _read(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """One drawing at 48, 96 and 192 px, uint8 [4, h, w], colours times alpha."""
    whole = _open(number).convert("RGBa")
    levels = [whole.reduce(4), whole.reduce(2), whole]
    return tuple(torch.from_numpy(np.array(level)).permute(2, 0, 1) for level in levels)


def thumbnail(number: int, side: int) -> Tensor:
    """A drawing made small, float32 [4, side, side] in [0, 1], colours times alpha."""
    small = _open(number).convert("RGBa").resize((side, side), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255


def _open(number: int) -> Image.Image:
    name, style = drawings()[number]
    return Image.open(io.BytesIO(_archive(style).read(f"{name}.webp"))).convert("RGBA")


@functools.cache
def _archive(style: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO((_FOLDER / f"{style}.zip").read_bytes()))


def shadow(numbers: Tensor) -> Tensor:
    """What drawings shade, float32 [N, 1, 32, 32] in [0, 1]: alpha, blurred, in the middle of a square 4/3 as wide."""
    alpha = F.avg_pool2d(sample(0, numbers)[:, 3:], 2)  # [N, 1, 24, 24]
    weights = torch.tensor([1.0, 4.0, 7.0, 4.0, 1.0], device=alpha.device) / 17
    padded = F.pad(alpha, (6, 6, 6, 6))
    return F.conv2d(F.conv2d(padded, weights.reshape(1, 1, 1, 5)), weights.reshape(1, 1, 5, 1))


@functools.lru_cache(maxsize=4096)
def is_asymmetric(number: int) -> bool:
    """Whether a drawing's mirror image differs visibly, so that "flip it" has something to do."""
    cell = _read(number)[0].float() / 255
    return (cell - cell.flip(2)).abs().mean().item() > 0.06

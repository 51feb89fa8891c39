"""The subjects: object-like drawings of OpenMoji (openmoji.org, CC BY-SA 4.0), split into seen and unseen ones.

The sheet is made by tools/draw_sprites.py and ships with the project, so the world never changes with a font.
"""

import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

CELL, COLUMNS = 96, 32
SMALL = 48  # a second, smaller sheet, for subjects drawn at up to BIG_FROM px: sampling the large one would alias
BIG_FROM = 64
_FOLDER = Path(__file__).parent
_HELD_OUT = 90  # drawings that training never shows


@functools.cache
def names() -> tuple[str, ...]:
    """The subjects' names, in the order of their numbers."""
    return tuple(json.loads((_FOLDER / "sprites.json").read_text(encoding="utf-8")))


@functools.cache
def split() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(seen, unseen) subject numbers: a fixed random choice."""
    order = np.random.default_rng(0).permutation(len(names()))
    unseen = set(order[:_HELD_OUT].tolist())
    return tuple(i for i in range(len(names())) if i not in unseen), tuple(sorted(unseen))


@functools.cache
def sheet() -> Tensor:
    """All drawings, float32 [subjects, 4, 96, 96]: red, green, blue times alpha, and alpha, in [0, 1]."""
    rgba = np.asarray(Image.open(_FOLDER / "sprites.png").convert("RGBA"), dtype=np.float32) / 255
    rows = rgba.shape[0] // CELL
    cells = rgba.reshape(rows, CELL, COLUMNS, CELL, 4).transpose(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)
    cells = torch.from_numpy(cells[: len(names())].copy())
    cells[:, :3] *= cells[:, 3:]
    return cells


@functools.cache
def sheets(device: torch.device) -> tuple[Tensor, Tensor]:
    """The large sheet and the small one ([subjects, 4, 48, 48]) on a device."""
    large = sheet().to(device)
    return large, F.interpolate(large, size=(SMALL, SMALL), mode="area")


@functools.cache
def is_asymmetric() -> tuple[bool, ...]:
    """For every subject whether its mirror image differs visibly, so that "flip it" has something to do."""
    cells = sheet()
    return tuple(((cells - cells.flip(3)).abs().mean(dim=(1, 2, 3)) > 0.06).tolist())

"""The backgrounds: 24 kinds drawn by formula, each in endless variants.

A kind is a function of `v` (float [N, VARIANT], uniform in [0, 1], what makes a variant) and of the pixel coordinates
x, y in [0, 1]; it returns colours [N, 3, H, W] in [0, 1].
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor

VARIANT = 12
MIDDLE = np.full(VARIANT, 0.5, np.float32)
"""The variant in the middle of all, where one is as good as another."""


def draw(kind: int, v: Tensor, side: int) -> Tensor:
    """Backgrounds of one kind, float32 [N, 3, side, side] in [0, 1], for variants float [N, VARIANT]."""
    line = (torch.arange(side, device=v.device, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(line, line, indexing="ij")
    return _KINDS[kind][1](_Variant(v), x, y).expand(-1, 3, side, side).clamp(0, 1)


class _Variant:
    """Reads a variant's numbers: `v(3)` is number 3, [N, 1, 1, 1]; `v(3, low, high)` stretched to a range."""

    def __init__(self, values: Tensor):
        self.values = values

    def __call__(self, place: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self.values[:, place].reshape(-1, 1, 1, 1)

    def colour(self, red: float, green: float, blue: float, spread: float = 0.08) -> Tensor:
        """A colour near the given one (0..255), [N, 3, 1, 1]; numbers 9 to 11 shift it."""
        shift = (self.values[:, 9:12] - 0.5) * 2 * spread
        return _rgb(red, green, blue, self.values) + shift.reshape(-1, 3, 1, 1)


def _rgb(red: float, green: float, blue: float, like: Tensor) -> Tensor:
    return _constant((red / 255, green / 255, blue / 255), like.device)


@functools.cache  # a GPU would be waited for at every copy
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).reshape(1, -1, 1, 1)


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share.clamp(0, 1)


def _edge(value: Tensor, width: float = 0.012) -> Tensor:
    """0 below zero, 1 above, with a soft edge."""
    return (value / width + 0.5).clamp(0, 1)


def _stars(v: _Variant, x: Tensor, y: Tensor, cells: int = 11) -> Tensor:
    """White points, one at most in every cell of a raster, [N, 1, H, W]."""
    column, row = (x * cells).floor(), (y * cells).floor()
    a = (column * 12.9 + row * 78.2 + v(0) * 57).sin() * 43.7
    b = (column * 39.3 + row * 11.1 + v(1) * 91).sin() * 37.1
    px, py = (column + 0.2 + 0.6 * (a - a.floor())) / cells, (row + 0.2 + 0.6 * (b - b.floor())) / cells
    lit = ((a + b) - (a + b).floor() > 0.45).float()
    return lit * (1 - ((x - px) ** 2 + (y - py) ** 2).sqrt() / 0.009).clamp(0, 1)


def _horizon(v: _Variant, x: Tensor, y: Tensor, low: float, high: float, wave: float) -> Tensor:
    """Height below a wavy horizon: positive on the ground."""
    return y - v(2, low, high) - wave * (x * v(3, 4, 9) + v(4) * 6.28).sin()


def _sky(v, x, y):
    cloud = ((x * v(3, 6, 11) + v(4) * 6.28).sin() + (y * v(5, 9, 15) + x * 4 + v(6) * 6.28).sin()) / 2
    return _mix(_mix(v.colour(90, 170, 245), v.colour(205, 235, 255), y), v.colour(255, 255, 255, 0), cloud * 1.6 - 0.5)


def _beach(v, x, y):
    sea, sand = y - v(2, 0.38, 0.46), y - v(3, 0.58, 0.68)
    sky = _mix(v.colour(120, 190, 250), v.colour(200, 235, 255), y * 2)
    return _mix(_mix(sky, v.colour(30, 120, 185), _edge(sea)), v.colour(238, 214, 160), _edge(sand))


def _meadow(v, x, y):
    sky = _mix(v.colour(110, 195, 250), v.colour(215, 240, 255), y * 1.8)
    grass = _mix(v.colour(125, 200, 80), v.colour(60, 140, 50), y * 2 - 1)
    return _mix(sky, grass, _edge(_horizon(v, x, y, 0.45, 0.6, 0.02)))


def _night(v, x, y):
    sky = _mix(v.colour(8, 12, 45, 0.04), v.colour(30, 40, 90, 0.04), y * 1.5) + _stars(v, x, y)
    return _mix(sky, v.colour(6, 22, 20, 0.03), _edge(_horizon(v, x, y, 0.6, 0.75, 0.015)))


def _snow(v, x, y):
    sky = _mix(v.colour(150, 165, 200), v.colour(205, 215, 235), y * 1.6) + 0.6 * _stars(v, x, y, 9)
    return _mix(sky, v.colour(245, 240, 252, 0.03), _edge(_horizon(v, x, y, 0.5, 0.65, 0.02)))


def _desert(v, x, y):
    sky = _mix(v.colour(135, 205, 240), v.colour(250, 235, 200), y * 1.8)
    far = _mix(sky, v.colour(225, 175, 95), _edge(_horizon(v, x, y, 0.42, 0.52, 0.05)))
    return _mix(far, v.colour(200, 140, 65), _edge(y - v(5, 0.68, 0.78) - 0.06 * (x * v(6, 4, 8) + v(7) * 6.28).sin()))


def _sea(v, x, y):
    sky = _mix(v.colour(150, 210, 250), v.colour(220, 242, 255), y * 2)
    wave = ((y * v(5, 70, 95)) + 1.2 * (x * v(6, 14, 22) + v(7) * 6.28).sin()).sin()
    water = _mix(v.colour(15, 75, 150), v.colour(40, 120, 195), wave * 0.5 + 0.5)
    return _mix(sky, water, _edge(y - v(2, 0.4, 0.55)))


def _sunset(v, x, y):
    sky = _mix(v.colour(95, 50, 120), v.colour(250, 150, 70), y * 1.7)
    sun = 0.13 - ((x - v(5, 0.2, 0.8)) ** 2 + (y - v(6, 0.4, 0.5)) ** 2).sqrt()
    return _mix(
        _mix(sky, v.colour(255, 225, 120), _edge(sun)), v.colour(45, 20, 60), _edge(_horizon(v, x, y, 0.6, 0.7, 0.012))
    )


def _forest(v, x, y):
    trunks = ((x * v(5, 28, 42) + v(6) * 6.28).sin() - 0.35) * 0.1
    back = _mix(v.colour(150, 190, 160), v.colour(110, 160, 120), y)
    ground = _mix(v.colour(50, 105, 50), v.colour(25, 65, 30), y * 2 - 1.2)
    return _mix(
        _mix(back, v.colour(85, 60, 40), _edge(trunks, 0.03)), ground, _edge(_horizon(v, x, y, 0.62, 0.74, 0.015))
    )


def _checker(v, x, y):
    cells = (v(0, 3, 7)).round()
    odd = ((x * cells + v(1)).floor() + (y * cells + v(2)).floor()).remainder(2)
    return _mix(v.colour(235, 235, 240), v.colour(80, 90, 130, 0.2), odd)


def _stripes(v, x, y):
    angle = v(0) * math.pi
    wave = ((x * angle.cos() + y * angle.sin()) * v(1, 30, 60) + v(2) * 6.28).sin()
    return _mix(v.colour(255, 235, 170, 0.1), v.colour(245, 150, 90, 0.1), _edge(wave, 0.5))


def _dots(v, x, y):
    cells = v(0, 5, 8)
    dx, dy = (x * cells + v(1)).remainder(1) - 0.5, (y * cells + v(2)).remainder(1) - 0.5
    return _mix(v.colour(185, 235, 220, 0.1), v.colour(70, 165, 155, 0.1), _edge(0.27 - (dx**2 + dy**2).sqrt(), 0.1))


def _bricks(v, x, y):
    rows = v(0, 7, 10).round()
    row = (y * rows).floor()
    along = (x * rows / 2 + 0.5 * row.remainder(2) + v(1)).remainder(1)
    gap = torch.minimum(along * 2, (y * rows).remainder(1))
    return _mix(v.colour(215, 205, 195), v.colour(170, 75, 55), _edge(gap - 0.1, 0.08))


def _space(v, x, y):
    cloud = (x * v(3, 4, 8) + v(4) * 6.28).sin() * (y * v(5, 4, 8) + v(6) * 6.28).sin()
    return _mix(v.colour(5, 3, 15, 0.02), v.colour(85, 30, 120, 0.1), cloud * 0.9) + _stars(v, x, y, 13)


def _lava(v, x, y):
    f = (x * v(0, 14, 22) + 2 * (y * v(1, 8, 12) + v(2) * 6.28).sin()).sin()
    g = (y * v(3, 14, 22) + 2 * (x * v(4, 8, 12) + v(5) * 6.28).sin()).sin()
    return _mix(v.colour(50, 8, 12, 0.04), v.colour(255, 130, 25), _edge(f + g - 0.15, 0.6))


def _wood(v, x, y):
    plank = (y * v(0, 4, 6).round() + v(1)).remainder(1)
    grain = (y * v(2, 60, 90) + 3 * (x * v(3, 3, 6) + v(4) * 6.28).sin()).sin() * 0.5 + 0.5
    board = _mix(v.colour(190, 130, 80), v.colour(165, 105, 60), grain)
    return _mix(v.colour(85, 50, 25, 0.04), board, _edge(plank - 0.05, 0.04))


def _rainbow(v, x, y):
    angle = v(0) * 2 * math.pi
    hue = (x * angle.cos() + y * angle.sin()) * v(1, 0.8, 1.3) + v(2)
    waves = torch.cat([(2 * math.pi * (hue + shift)).cos() for shift in (0, -1 / 3, 1 / 3)], dim=1)
    return 0.62 + 0.38 * waves


def _plain(red, green, blue):
    return lambda v, x, y: v.colour(red, green, blue, 0.07) + 0 * x


_KINDS = [
    ("in the sky", _sky),
    ("on a beach", _beach),
    ("in a meadow", _meadow),
    ("at night", _night),
    ("in the snow", _snow),
    ("in the desert", _desert),
    ("at sea", _sea),
    ("at sunset", _sunset),
    ("in a forest", _forest),
    ("on a checkered background", _checker),
    ("on a striped background", _stripes),
    ("on a dotted background", _dots),
    ("in front of a brick wall", _bricks),
    ("in space", _space),
    ("on lava", _lava),
    ("on wooden planks", _wood),
    ("on a rainbow background", _rainbow),
    ("on a red background", _plain(215, 60, 60)),
    ("on a yellow background", _plain(240, 215, 80)),
    ("on a green background", _plain(60, 165, 85)),
    ("on a blue background", _plain(60, 100, 220)),
    ("on a pink background", _plain(240, 165, 195)),
    ("on a white background", _plain(245, 245, 245)),
    ("on a grey background", _plain(130, 130, 130)),
]
KINDS = len(_KINDS)
PHRASES = tuple(phrase for phrase, _ in _KINDS)
"""Where something is that stands before each kind of background."""
PLAIN_WHITE = 22
PLAIN = tuple(range(17, KINDS))

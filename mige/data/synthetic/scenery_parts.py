"""What the second world's backgrounds are made of: sky, clouds, hills, grounds in perspective, light.

Letters: N images, H and W pixels. Coordinates x and y are in shorter sides of the image, h is its height in them.
"""

import functools
import math

import torch
from torch import Tensor

TAU = 2 * math.pi


class Variant:
    """Reads a variant's numbers: `v(3)` is number 3, [N, 1, 1, 1]; `v(3, low, high)` stretched to a range."""

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def __call__(self, place: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self.numbers[:, place].reshape(-1, 1, 1, 1)

    def colour(self, red: float, green: float, blue: float, spread: float = 0.08) -> Tensor:
        """A colour near the given one (0..255), [N, 3, 1, 1]; numbers 9 to 11 shift it."""
        shift = (self.numbers[:, 9:12] - 0.5) * 2 * spread
        return constant((red / 255, green / 255, blue / 255), self.numbers.device) + shift.reshape(-1, 3, 1, 1)


@functools.cache  # a GPU would be waited for at every copy
def constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers as a tensor [1, C, 1, 1] on the device."""
    return torch.tensor(numbers, device=device).reshape(1, -1, 1, 1)


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """From a to b by a share that is kept in [0, 1]; all broadcast to [N, 3, H, W]."""
    return a + (b - a) * share.clamp(0, 1)


def edge(value: Tensor, width: float = 0.008) -> Tensor:
    """0 below zero, 1 above, with a soft edge `width` wide: [N, 1, H, W]."""
    return (value / width + 0.5).clamp(0, 1)


def cloudy(v: Variant, x: Tensor, y: Tensor, scale: float) -> Tensor:
    """Smooth noise in about [-1, 1], [N, 1, H, W]: waves in turned directions, bent by one another."""
    a, b = v(4, 0, TAU), v(6, 0, TAU)
    bend = (x * scale * 0.7 + b).sin() + (y * scale * 1.1 + a).sin()
    low = (x * scale + y * scale * 0.6 + bend + a).sin() + (y * scale * 1.3 - x * scale * 0.4 + 1.3 * bend + b).sin()
    high = (x * scale * 2.7 - y * scale * 1.9 + 2 * bend + b).sin() + (x * scale * 1.7 + y * scale * 3.3 - bend).sin()
    return (low + 0.5 * high) / 3


def gradient(v: Variant, y: Tensor, h: float, top: Tensor, low: Tensor, power: float = 1.0) -> Tensor:
    """A sky from `top` down to `low` colours: [N, 3, H, W]."""
    return mix(top, low, (y / (h * v(2, 0.5, 0.62))).clamp(0, 1) ** power)


def clouds(v: Variant, sky: Tensor, x: Tensor, y: Tensor, cover: float, light: Tensor, dark: Tensor) -> Tensor:
    """Clouds on a sky, lit from above: [N, 3, H, W]; more `cover`, more of them."""
    thick = cloudy(v, x, y * 1.8, 6.0) + cover
    lit = cloudy(v, x, y * 1.8 - 0.04, 6.0) + cover  # what lies above
    return mix(sky, mix(light, dark, 0.5 + 2.2 * (lit - thick) + 0.3 * thick), thick * 2.0)


def hills(v: Variant, x: Tensor, y: Tensor, h: float, at: Tensor, number: int, wave: float, wide: float) -> Tensor:
    """Height below a wavy line, positive on the hill: [N, 1, H, W] in shorter sides."""
    phase = v(number, 0, TAU)
    return y - h * at + wave * ((x * wide + phase).sin() + 0.4 * (x * wide * 2.3 + 2 * phase).sin())


def plane(v: Variant, x: Tensor, y: Tensor, h: float, horizon: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A floor in perspective: across and along it, and how near (1 at the lower edge), each [N, 1, H, W]."""
    near = ((y - h * horizon) / (h * (1 - horizon))).clamp(0.001, 1)
    across = (x - v(5, 0.2, 0.8)) / near.clamp(min=0.03)
    return across, 1 / near.clamp(min=0.03), near


def stars(v: Variant, x: Tensor, y: Tensor, cells: int = 14) -> Tensor:
    """White points, one at most in every cell of a raster, [N, 1, H, W]."""
    column, row = (x * cells).floor(), (y * cells).floor()
    a = (column * 1.9 + row * 7.2 + v(0) * 57).sin() * 13.7
    b = (column * 3.3 + row * 1.1 + v(1) * 91).sin() * 17.1
    px, py = (column + 0.2 + 0.6 * (a - a.floor())) / cells, (row + 0.2 + 0.6 * (b - b.floor())) / cells
    bright = ((a + b) - (a + b).floor() - 0.4).clamp(min=0) * 1.7
    return bright * (1 - ((x - px) ** 2 + (y - py) ** 2).sqrt() / 0.007).clamp(0, 1)


def glow(x: Tensor, y: Tensor, cx: Tensor, cy: Tensor, radius: float) -> Tensor:
    """1 in the middle, falling off smoothly: [N, 1, H, W]."""
    return (-((x - cx) ** 2 + (y - cy) ** 2) / radius**2).exp()


def shaded(v: Variant, colour: Tensor, x: Tensor, y: Tensor, h: float, depth: float = 0.28) -> Tensor:
    """Light that falls off from a place near the top: colours [N, 3, H, W]."""
    away = ((x - v(7, 0.2, 0.8)) ** 2 + (y - h * v(8, 0.1, 0.4)) ** 2).sqrt()
    return colour * (1.06 - depth * away)


def triangles(t: Tensor) -> Tensor:
    """Triangles between -1/2 and 1/2 with a period of two: [N, 1, H, W]."""
    return ((t / 2 - (t / 2).floor()) * 2 - 1).abs() - 0.5

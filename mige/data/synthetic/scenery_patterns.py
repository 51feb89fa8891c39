"""The second world's backgrounds without a place: patterns and plain colours, softly lit.

v, x, y and h: as in `scenery`.
"""

import math

import torch

from mige.data.synthetic.scenery_parts import TAU, cloudy, edge, mix, shaded, stars


def stripes(v, x, y, h):
    """Slanted stripes, [N, 3, H, W]."""
    angle = v(0) * math.pi
    wave = ((x * angle.cos() + y * angle.sin()) * v(1, 30, 60) + v(2) * TAU).sin()
    return shaded(v, mix(v.colour(255, 232, 164, 0.1), v.colour(244, 150, 92, 0.1), edge(wave, 0.4)), x, y, h)


def dots(v, x, y, h):
    """Round dots, lit like balls, [N, 3, H, W]."""
    cells = v(0, 5, 8)
    dx, dy = (x * cells + v(1)).remainder(1) - 0.5, (y * cells + v(2)).remainder(1) - 0.5
    away = (dx**2 + dy**2).sqrt()
    dot = v.colour(70, 165, 155, 0.1) * (1.1 - 0.5 * ((dx + 0.1) ** 2 + (dy + 0.1) ** 2).sqrt())
    return shaded(v, mix(v.colour(190, 236, 222, 0.1), dot, edge(0.27 - away, 0.06)), x, y, h)


def bricks(v, x, y, h):
    """A wall in running bond, [N, 3, H, W]."""
    rows = v(0, 8, 11).round()
    row = (y * rows).floor()
    along = x * rows / 2 + 0.5 * row.remainder(2) + v(1)
    own = (along.floor() * 1.7 + row * 2.9).sin()
    inside_x, inside_y = (along - along.floor()) * 2, y * rows - row
    gap = torch.minimum(torch.minimum(inside_x, 2 - inside_x), torch.minimum(inside_y, 1 - inside_y))
    brick = v.colour(178, 84, 62) * (1 + 0.1 * own) + 0.05 * (0.5 - inside_y)
    return shaded(v, mix(v.colour(208, 198, 188), brick, edge(gap - 0.07, 0.06)), x, y, h)


def space(v, x, y, h):
    """Stars and nebulae, [N, 3, H, W]."""
    dust = cloudy(v, x, y, 4.0)
    sky = mix(v.colour(6, 4, 18, 0.02), v.colour(92, 34, 128, 0.1), dust * 0.8)
    sky = mix(sky, v.colour(24, 96, 150, 0.08), cloudy(v, y, x, 5.0) * 0.5 - 0.1)
    return sky + stars(v, x, y, 16) + 0.5 * stars(v, y, x, 23)


def lava(v, x, y, h):
    """Glowing veins in a crust, [N, 3, H, W]."""
    f = (x * v(0, 14, 22) + 2 * (y * v(1, 8, 12) + v(2) * TAU).sin()).sin()
    g = (y * v(3, 14, 22) + 2 * (x * v(4, 8, 12) + v(5) * TAU).sin()).sin()
    hot = f + g - 0.15
    crust = mix(v.colour(64, 20, 18, 0.04), v.colour(30, 8, 12, 0.03), 0.4 - hot)
    return mix(crust, mix(v.colour(236, 72, 16), v.colour(255, 206, 84), hot * 0.9), edge(hot, 0.4))


def rainbow(v, x, y, h):
    """All hues along a direction, [N, 3, H, W]."""
    angle = v(0) * TAU
    hue = (x * angle.cos() + y * angle.sin()) * v(1, 0.8, 1.3) + v(2)
    waves = torch.cat([(TAU * (hue + shift)).cos() for shift in (0, -1 / 3, 1 / 3)], dim=1)
    return shaded(v, 0.62 + 0.38 * waves, x, y, h, 0.2)


def plain(red, green, blue):
    """A kind of one colour (0..255), lit from above; it returns [N, 3, H, W]."""
    return lambda v, x, y, h: shaded(v, v.colour(red, green, blue, 0.07), x, y, h, 0.22)

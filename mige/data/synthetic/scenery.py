"""The second world's backgrounds: shaded places with a ground in perspective, each in endless variants.

As in `backgrounds`, a kind is a function of a variant's numbers `v` and of coordinates: x to the right and y downwards
in shorter sides of the image, h the image's height in them. It returns colours [N, 3, H, W].
"""

import functools

import torch
from torch import Tensor

from mige.data.synthetic.scenery_parts import (
    TAU,
    Variant,
    clouds,
    cloudy,
    constant,
    edge,
    glow,
    gradient,
    hills,
    mix,
    plane,
    shaded,
    stars,
    triangles,
)
from mige.data.synthetic.scenery_patterns import bricks, dots, lava, plain, rainbow, space, stripes


def draw(kind: int, v: Tensor, height: int, width: int) -> Tensor:
    """Backgrounds of one kind, float32 [N, 3, height, width] in [0, 1], for variants float [N, 12]."""
    y, x, h = _coordinates(height, width, v.device)
    return _KINDS[kind][1](Variant(v), x, y, h).expand(-1, 3, height, width).clamp(0, 1)


@functools.cache
def _coordinates(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    side = min(height, width)
    down, right = (torch.arange(n, device=device, dtype=torch.float32).add(0.5) / side for n in (height, width))
    return *torch.meshgrid(down, right, indexing="ij"), height / side


# ---- places --------------------------------------------------------------------------------------------------------


def _high_sky(v, x, y, h):
    sky = mix(v.colour(60, 140, 230), v.colour(190, 226, 252), y / h)
    return clouds(v, sky, x, y, 0.05, v.colour(255, 255, 255, 0.02), v.colour(186, 204, 226, 0.03))


def _beach(v, x, y, h):
    sea, sand = v(2, 0.36, 0.44), v(3, 0.56, 0.64)
    sky = clouds(v, gradient(v, y, h, v.colour(90, 170, 240), v.colour(205, 235, 252)), x, y, -0.5,
                  v.colour(255, 255, 255, 0.02), v.colour(215, 225, 238, 0.02))  # fmt: skip
    across, along, near = plane(v, x, y, h, sea)
    waves = (along * 9 + 1.5 * (across * 2 + v(6, 0, TAU)).sin()).sin() * near.sqrt()
    water = mix(v.colour(20, 95, 165), v.colour(60, 175, 200), near * 2.2) + 0.07 * waves
    shore = y - h * sand - 0.015 * (x * v(6, 5, 9) + v(4, 0, TAU)).sin()
    ripples = (along * 26 + 3 * (across * 3).sin()).sin() * near
    beach = mix(v.colour(244, 222, 170), v.colour(222, 190, 130), near) + 0.025 * ripples
    foam = (1 - (shore + 0.012).abs() / 0.014).clamp(0, 1)
    return mix(mix(mix(sky, water, edge(y - h * sea)), beach, edge(shore)), v.colour(255, 255, 255, 0.01), foam)


def _meadow(v, x, y, h):
    sky = clouds(v, gradient(v, y, h, v.colour(90, 175, 245), v.colour(212, 238, 255)), x, y, -0.3,
                  v.colour(255, 255, 255, 0.02), v.colour(205, 218, 235, 0.02))  # fmt: skip
    far = hills(v, x, y, h, v(3, 0.42, 0.5), 4, 0.035, 5.0)
    turf = hills(v, x, y, h, v(3, 0.52, 0.6), 6, 0.015, 3.0)
    across, along, near = plane(v, x, y, h, v(3, 0.5, 0.58))
    blades = (along * 22 + 4 * (across * 5).sin()).sin() * (across * 31 + along * 17).sin() * near
    grass = mix(v.colour(140, 205, 95), v.colour(62, 140, 52), near * 1.1) + 0.06 * blades
    hill = mix(v.colour(150, 200, 150), v.colour(100, 170, 95), far * 6)
    return mix(mix(sky, hill, edge(far)), grass, edge(turf))


def _night(v, x, y, h):
    sky = gradient(v, y, h, v.colour(6, 10, 38, 0.03), v.colour(44, 54, 112, 0.04)) + stars(v, x, y)
    cx, cy = v(5, 0.15, 0.85), h * v(6, 0.1, 0.25)
    moon = 0.07 - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()
    sky = mix(sky + 0.25 * glow(x, y, cx, cy, 0.2), v.colour(250, 244, 214, 0.03), edge(moon))
    far = hills(v, x, y, h, v(3, 0.55, 0.62), 4, 0.04, 5.0)
    turf = hills(v, x, y, h, v(3, 0.66, 0.72), 8, 0.02, 3.0)
    land = mix(v.colour(20, 32, 62, 0.03), v.colour(12, 20, 42, 0.03), far * 5)
    return mix(
        mix(sky, land, edge(far)), mix(v.colour(16, 40, 38, 0.03), v.colour(6, 18, 22, 0.02), turf * 3), edge(turf)
    )


def _snow(v, x, y, h):
    sky = gradient(v, y, h, v.colour(140, 160, 200), v.colour(218, 226, 242)) + 0.5 * stars(v, x, y, 9)
    far = hills(v, x, y, h, v(3, 0.4, 0.5), 4, 0.06, 4.5)
    turf = hills(v, x, y, h, v(3, 0.56, 0.64), 6, 0.02, 3.0)
    drift = cloudy(v, x, y * 3, 4.0)
    mountains = mix(v.colour(226, 232, 246, 0.03), v.colour(170, 184, 214, 0.04), far * 5)
    ground = mix(v.colour(250, 250, 255, 0.02), v.colour(204, 214, 236, 0.03), 0.35 + 0.5 * drift)
    return mix(mix(sky, mountains, edge(far)), ground, edge(turf))


def _desert(v, x, y, h):
    sky = gradient(v, y, h, v.colour(110, 185, 235), v.colour(252, 232, 196))
    image = sky
    for number, (at, wave) in enumerate(((0.46, 0.05), (0.58, 0.06), (0.76, 0.07))):
        dune = hills(v, x, y, h, v(3, at - 0.03, at + 0.03), 4 + number, wave, 3.6 - 0.6 * number)
        ripples = ((y - x * 0.3) * (150 - 30 * number) + 3 * (x * 9).sin()).sin()
        sand = mix(v.colour(244, 196, 116), v.colour(196, 132, 62), dune * 4 + 0.15) + 0.02 * number * ripples
        image = mix(image, sand, edge(dune))
    return image


def _water(v, x, y, h, horizon, deep, light):
    """Waves in perspective with a path of glitter."""
    across, along, near = plane(v, x, y, h, horizon)
    waves = (along * 11 + 2 * (across * 3 + v(6, 0, TAU)).sin()).sin() + (along * 19 - 2 * (across * 5).sin()).sin()
    path = glow(x, 0 * y, v(5, 0.2, 0.8), 0 * near, 0.18) * (1.2 - near)
    return mix(deep, light, 0.35 + 0.2 * waves * near.sqrt() + 0.3 * (1 - near)) + path * (0.25 + 0.12 * waves)


def _sea(v, x, y, h):
    horizon = v(2, 0.38, 0.5)
    sky = clouds(v, gradient(v, y, h, v.colour(110, 185, 245), v.colour(222, 242, 255)), x, y, -0.2,
                  v.colour(255, 255, 255, 0.02), v.colour(200, 215, 232, 0.02))  # fmt: skip
    return mix(sky, _water(v, x, y, h, horizon, v.colour(8, 62, 130), v.colour(64, 150, 205)), edge(y - h * horizon))


def _sunset(v, x, y, h):
    horizon, cx = v(2, 0.56, 0.66), v(5, 0.2, 0.8)
    sky = mix(v.colour(70, 42, 118), v.colour(252, 140, 74), (y / (h * horizon)).clamp(0, 1) ** 1.3)
    sky = clouds(v, sky, x, y, -0.35, v.colour(255, 176, 120), v.colour(150, 66, 106))
    cy = h * v(8, 0.42, 0.52)
    sky = sky + v.colour(255, 190, 90) * 0.6 * glow(x, y, cx, cy, 0.3)
    sky = mix(sky, v.colour(255, 236, 160, 0.03), edge(0.1 - ((x - cx) ** 2 + (y - cy) ** 2).sqrt()))
    return mix(sky, _water(v, x, y, h, horizon, v.colour(58, 26, 74), v.colour(230, 120, 86)), edge(y - h * horizon))


def _forest(v, x, y, h):
    image = mix(v.colour(196, 222, 188), v.colour(140, 186, 142), y / h)
    for number, (wide, at) in enumerate(((24.0, 0.58), (15.0, 0.64), (9.0, 0.72))):
        bark = (x * wide * v(5, 0.85, 1.15) + v(4 + number, 0, TAU) + 0.3 * (y * 3).sin()).sin()
        trunk = mix(v.colour(150, 160, 130), v.colour(72, 52, 36), constant((0.3 + 0.3 * number,), x.device)) * (
            0.85 + 0.3 * bark
        )
        image = mix(image, trunk, edge((bark - 0.72) * 0.1, 0.03))
        turf = hills(v, x, y, h, v(3, at - 0.03, at + 0.03), 6 + number, 0.012, 4.0)
        moss = mix(v.colour(120, 165, 84), v.colour(34, 78, 36), turf * 3 + 0.2 * number)
        image = mix(image, moss + 0.02 * (x * 90 + y * 40).sin() * (y * 110).sin(), edge(turf))
    crown = cloudy(v, x, y * 1.5, 9.0) + 1.2 - y / h * 5.0
    return mix(image, v.colour(46, 104, 50) + 0.06 * cloudy(v, x, y, 30.0), edge(crown, 0.3))


def _mountains(v, x, y, h):
    image = gradient(v, y, h, v.colour(86, 150, 226), v.colour(224, 236, 248))
    for number, at in enumerate((0.34, 0.46, 0.6)):
        wide = 7.0 - 1.5 * number
        ridge = (x * wide + v(3 + number, 0, TAU)) / TAU
        peak = ((ridge - ridge.floor()) * 2 - 1).abs() + 0.35 * (((ridge * 2.6) - (ridge * 2.6).floor()) * 2 - 1).abs()
        rock = y - h * at + (peak - 0.6) * (0.2 - 0.03 * number)
        lit = ((ridge - ridge.floor()) > 0.5).float()
        stone = mix(v.colour(150, 166, 196), v.colour(78, 88, 104), constant((0.4 * number,), x.device)) * (
            0.84 + 0.2 * lit
        )
        cap = edge(0.075 - rock + 0.02 * (x * 60).sin(), 0.03) if number < 2 else 0 * rock
        image = mix(image, mix(stone, v.colour(246, 248, 255, 0.02) * (0.88 + 0.12 * lit), cap), edge(rock))
    turf = hills(v, x, y, h, v(8, 0.66, 0.74), 6, 0.02, 3.0)
    return mix(image, mix(v.colour(128, 180, 92), v.colour(60, 116, 54), turf * 3), edge(turf))


def _under_water(v, x, y, h):
    rays = ((x + 0.35 * y) * v(5, 9, 15) + v(4, 0, TAU)).sin() * ((x + 0.3 * y) * 23 + v(6, 0, TAU)).sin()
    sea = mix(v.colour(70, 190, 220), v.colour(8, 62, 122), y / h * 1.1) + 0.09 * rays * (1 - y / h)
    bed = hills(v, x, y, h, v(3, 0.76, 0.84), 7, 0.03, 4.0)
    across, along, near = plane(v, x, y, h, v(3, 0.72, 0.8))
    sand = (
        mix(v.colour(126, 168, 160), v.colour(206, 196, 150), near) + 0.04 * (along * 16 + 3 * (across * 3).sin()).sin()
    )
    return mix(sea, sand, edge(bed, 0.03))


def _road(v, x, y, h):
    horizon = v(2, 0.4, 0.48)
    sky = clouds(v, gradient(v, y, h, v.colour(110, 180, 240), v.colour(220, 236, 248)), x, y, -0.3,
                  v.colour(255, 255, 255, 0.02), v.colour(205, 216, 230, 0.02))  # fmt: skip
    across, along, near = plane(v, x, y, h, horizon)
    verge = mix(v.colour(136, 180, 96), v.colour(88, 138, 62), near) + 0.04 * (along * 12 + v(6, 0, TAU)).sin() * near
    tar = mix(v.colour(132, 134, 140, 0.04), v.colour(84, 86, 94, 0.04), near) + 0.015 * (across * 60).sin() * near
    dash = edge(((along * 3 + v(4, 0, TAU)).sin() + 0.2) * 0.1, 0.06)
    line = edge(0.025 - across.abs(), 0.012) * dash + edge(0.02 - (across.abs() - 0.5).abs(), 0.012)
    ground = mix(mix(verge, tar, edge(0.56 - across.abs(), 0.02)), v.colour(245, 245, 240, 0.02), line)
    return mix(sky, ground, edge(y - h * horizon))


def _room(v, x, y, h):
    floor = v(2, 0.6, 0.68)
    wall = shaded(v, v.colour(226, 206, 178, 0.12), x, y, h, 0.3) + 0.008 * (x * 120).sin()
    across, along, near = plane(v, x, y, h, floor - 0.25)
    board = across * 3
    grain = (along * 25 + 5 * (board.floor() * 1.7).sin()).sin() * 0.5 + 0.5
    gap = ((board - board.floor()) - 0.5).abs()
    planks = mix(v.colour(176, 122, 78), v.colour(150, 98, 60), grain * near) * (
        0.94 + 0.08 * (board.floor() * 2.4).sin()
    )
    planks = mix(planks, v.colour(92, 58, 36), edge(gap - 0.47, 0.04))
    line = y - h * floor
    skirting = mix(wall, v.colour(248, 246, 240, 0.02), edge(line + 0.05) * edge(-line))
    return mix(skirting, planks * (0.8 + 0.25 * near), edge(line))


def _tiles(v, x, y, h):
    horizon = v(2, 0.34, 0.44)
    wall = shaded(v, v.colour(190, 200, 216, 0.1), x, y, h, 0.35)
    across, along, near = plane(v, x, y, h, horizon - 0.12)
    a, b = across * v(0, 2.2, 4.0) + 50, along * v(1, 1.6, 2.4)
    sharp = (near * 4).clamp(0, 1)  # what is far blurs
    odd = (edge(triangles(a), 0.1) - 0.5) * (edge(triangles(b), 0.1) - 0.5) * 2 * sharp + 0.5
    tile = mix(v.colour(238, 238, 240, 0.03), v.colour(76, 86, 128, 0.15), odd)
    return mix(wall, tile * (0.82 + 0.22 * near), edge(y - h * horizon))


def _planks(v, x, y, h):
    horizon = v(2, 0.18, 0.3)
    wall = shaded(v, v.colour(214, 196, 168, 0.12), x, y, h, 0.3)
    across, along, near = plane(v, x, y, h, horizon - 0.15)
    board = across * v(0, 1.6, 2.6) + 40
    grain = (board * 22 + 1.6 * (along * 3 + board.floor() * 2.1).sin() + v(6, 0, TAU)).sin() * 0.5 + 0.5
    wood = mix(v.colour(206, 150, 96), v.colour(164, 106, 60), grain * 0.6 + 0.3 * (board.floor() * 1.3).sin())
    wood = mix(wood, v.colour(96, 58, 30, 0.04), edge(((board - board.floor()) - 0.5).abs() - 0.475, 0.03))
    return mix(wall, wood * (0.8 + 0.26 * near), edge(y - h * horizon))


_KINDS = [
    ("in the sky", _high_sky),
    ("on a beach", _beach),
    ("in a meadow", _meadow),
    ("at night", _night),
    ("in the snow", _snow),
    ("in the desert", _desert),
    ("at sea", _sea),
    ("at sunset", _sunset),
    ("in a forest", _forest),
    ("in the mountains", _mountains),
    ("under water", _under_water),
    ("on a road", _road),
    ("in a room", _room),
    ("on a tiled floor", _tiles),
    ("on wooden planks", _planks),
    ("on a striped background", stripes),
    ("on a dotted background", dots),
    ("in front of a brick wall", bricks),
    ("in space", space),
    ("on lava", lava),
    ("on a rainbow background", rainbow),
    ("on a red background", plain(215, 60, 60)),
    ("on a yellow background", plain(240, 215, 80)),
    ("on a green background", plain(60, 165, 85)),
    ("on a blue background", plain(60, 100, 220)),
    ("on a pink background", plain(240, 165, 195)),
    ("on a white background", plain(245, 245, 245)),
    ("on a grey background", plain(130, 130, 130)),
]
PHRASES = tuple(phrase for phrase, _ in _KINDS)
"""Where something is that stands before each kind of background."""
PLAIN = tuple(range(21, len(_KINDS)))
PLAIN_WHITE = 26
FLOORS = frozenset([*range(1, 6), *range(8, 15), *PLAIN])
"""Kinds on which shadows lie flat, at a subject's foot; on the others they fall behind it."""

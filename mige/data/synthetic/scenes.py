"""Scenes: a background and up to five subjects, as plain numbers; and their drawing, batched, on any device.

Letters: P images, S places for subjects, N images or subjects drawn in one go, H and W pixels.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mige.data.synthetic import backgrounds
from mige.data.synthetic.world import FIRST, World

SIDE = 128
"""Units in the shorter side of an image, in which scenes are laid out; px of the first world."""
SHADOW_WIDER = 4 / 3
"""Side of a shadow's square, in sides of its subject's."""
Window = tuple[slice, slice]
"""Rows and columns of an image."""
WHOLE: Window = (slice(None), slice(None))
MAX_SUBJECTS = 5
"""Subjects a scene holds at most."""
PLAIN_COLOUR = np.eye(3, dtype=np.float32)
SWAPS = tuple(np.eye(3, dtype=np.float32)[list(order)] for order in
              ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)))  # fmt: skip
"""Colour matrices that exchange red, green and blue: six identities from one drawing."""
COLOURS = {
    "red": (235, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (255, 225, 50),
    "green": (50, 190, 70),
    "blue": (50, 90, 235),
    "purple": (150, 60, 200),
    "pink": (255, 150, 200),
    "grey": (175, 175, 175),
}


@dataclass(frozen=True, eq=False)
class Placed:
    """A subject in a scene."""

    sprite: int  # its number in its world
    x: float  # centre, in units
    y: float
    size: float  # side of its square, in units; the drawing fills 0.92 of it
    angle: float = 0.0  # degrees, clockwise
    flip: bool = False  # mirrored
    colour: np.ndarray = field(default_factory=lambda: PLAIN_COLOUR)  # [3, 3], new red, green, blue from the drawing's
    other: int = -1  # number of a drawing that takes over beyond a line, -1 for none
    cut: tuple[float, float] = (0.0, 0.0)  # that line: direction of its far side, degrees; offset, half sides


@dataclass(frozen=True, eq=False)
class Scene:
    """A background and the subjects on it, the later ones in front."""

    background: int
    variant: np.ndarray  # float32 [VARIANT] in [0, 1]
    subjects: tuple[Placed, ...] = ()

    def without(self, subject: Placed) -> "Scene":
        """The scene but for that very subject."""
        return replace(self, subjects=tuple(s for s in self.subjects if s is not subject))

    def with_(self, *subjects: Placed) -> "Scene":
        """The scene with these in front of its subjects."""
        return replace(self, subjects=self.subjects + subjects)

    def exchange(self, old: Placed, new: Placed) -> "Scene":
        """`new` in the place of `old` in the order of drawing."""
        return replace(self, subjects=tuple(new if s is old else s for s in self.subjects))


def tint(name: str) -> np.ndarray:
    """The colour matrix of "make it red": the brightness stays, so black outlines do too."""
    weights = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # of red, green and blue in brightness, ITU-R BT.601
    return (np.array(COLOURS[name], dtype=np.float32) / 255)[:, None] * weights


@dataclass(frozen=True)
class Scenes:
    """P scenes as arrays, for the way from the worker processes to the device.

    Attributes:
        background: int64 [P]. variant: float32 [P, VARIANT]. sprite: int64 [P, S], -1 for none.
        place: float32 [P, S, 5]: x, y, size, angle in radians, flip (-1 or 1). colour: float32 [P, S, 3, 3].
        other: int64 [P, S], -1 for none. cut: float32 [P, S, 3]: the line's normal (x, y) and its offset.
    """

    background: Tensor
    variant: Tensor
    sprite: Tensor
    place: Tensor
    colour: Tensor
    other: Tensor
    cut: Tensor

    def pin_memory(self) -> "Scenes":
        """Called by the data loader, for fast copies to a GPU."""
        return Scenes(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    @classmethod
    def stack(cls, scenes: Sequence[Scene]) -> "Scenes":
        """Scenes of at most S subjects each, in the order given."""
        many = len(scenes)
        sprite = np.full((many, MAX_SUBJECTS), -1, dtype=np.int64)
        place, colour = np.zeros((many, MAX_SUBJECTS, 5), np.float32), np.zeros((many, MAX_SUBJECTS, 3, 3), np.float32)
        other, cut = np.full((many, MAX_SUBJECTS), -1, dtype=np.int64), np.zeros((many, MAX_SUBJECTS, 3), np.float32)
        for row, scene in enumerate(scenes):
            for slot, s in enumerate(scene.subjects):
                sprite[row, slot], colour[row, slot] = s.sprite, s.colour
                place[row, slot] = s.x, s.y, s.size, math.radians(s.angle), -1 if s.flip else 1
                if s.other >= 0:
                    towards = math.radians(s.cut[0])
                    other[row, slot], cut[row, slot] = s.other, (math.cos(towards), math.sin(towards), s.cut[1])
        return cls(
            torch.tensor([scene.background for scene in scenes], dtype=torch.long),
            torch.from_numpy(np.stack([scene.variant for scene in scenes])),
            *map(torch.from_numpy, (sprite, place, colour, other, cut)),
        )


def draw(
    scenes: Scenes,
    device: torch.device | str = "cpu",
    side: int | tuple[int, int] | None = None,
    world: World = FIRST,
) -> Tensor:
    """Images of P scenes of a world, float32 [P, 3, height, width] in [-1, 1], drawn on `device`.

    side: of square images, or height and width; the world's side by default. The frame in which the scenes were laid
    out must have this shape. Everything that decides the shapes of the work is read on the CPU, so that a GPU is never
    waited for.
    """
    device, side = torch.device(device), world.side if side is None else side
    height, width = (side, side) if isinstance(side, int) else side
    kinds = scenes.background.unique().tolist()
    level = torch.bucketize(scenes.place[..., 2].contiguous(), torch.tensor(world.upto))  # [P, S]
    layers = [(depth, slot) for slot in range(MAX_SUBJECTS) for depth in range(len(world.upto) + 1)]
    chosen = [scenes.background == kind for kind in kinds]
    chosen += [((scenes.sprite >= 0) & (level == depth))[:, slot] for depth, slot in layers]
    rows = _upload([one.nonzero().flatten() for one in chosen], device)
    canvas = torch.empty(len(scenes.background), 3, height, width, device=device)
    on_floor = torch.tensor([kind in world.floors for kind in range(len(world.phrases))])[scenes.background]
    variant, place, colour, sprite, other, cut, on_floor = (
        t.to(device, non_blocking=True)
        for t in (scenes.variant, scenes.place, scenes.colour, scenes.sprite, scenes.other, scenes.cut, on_floor)
    )
    joined = (scenes.other >= 0).any(dim=0).tolist()  # in which slots
    for kind, here in zip(kinds, rows[: len(kinds)], strict=True):
        canvas[here] = world.draw(kind, variant[here], height, width)
    for (depth, slot), here in zip(layers, rows[len(kinds) :], strict=True):
        if len(here):
            drawings, shades = _subjects(
                world, depth, sprite[here, slot], other[here, slot], cut[here, slot], joined[slot]
            )
            layer = _layer(drawings, place[here, slot], colour[here, slot], height, width)
            under = canvas[here]
            if shades is not None:
                under = under * (1 - _shadow(shades, place[here, slot], on_floor[here], height, width))
            canvas[here] = under * (1 - layer[:, 3:]) + layer[:, :3]
    return canvas * 2 - 1


def cut_out(
    subjects: Sequence[Placed],
    shape: tuple[int, int],
    device: torch.device,
    world: World,
    *,
    on_floor: bool,
    window: Window = WHOLE,
) -> tuple[Tensor, Tensor, Tensor]:
    """K subjects of a world with shadows, each alone on nothing, as an image of that shape shows them in a window.

    Returns colours times alpha [K, 3, h, w], alpha [K, 1, h, w], and the share of light that the shadow takes from what
    is under it [K, 1, h, w], all float32 in [0, 1]; on_floor: whether shadows lie flat, as the background decides.
    """
    made = Scenes.stack([Scene(0, np.zeros(backgrounds.VARIANT, np.float32), (one,)) for one in subjects])
    level = torch.bucketize(made.place[:, 0, 2].contiguous(), torch.tensor(world.upto))
    place, colour, sprite, other, cut = (
        t[:, 0].to(device) for t in (made.place, made.colour, made.sprite, made.other, made.cut)
    )
    flat, parts, order = torch.full((len(subjects),), on_floor, device=device), [], []
    for depth in level.unique().tolist():
        here = (level == depth).nonzero().flatten()
        order.append(here)
        here = here.to(device)
        drawings, shades = _subjects(world, depth, sprite[here], other[here], cut[here], joined=True)
        layer = _layer(drawings, place[here], colour[here], *shape, window)
        parts.append(torch.cat([layer, _shadow(shades, place[here], flat[here], *shape, window)], dim=1))
    whole = torch.cat(parts)[torch.cat(order).argsort().to(device)]
    return whole[:, :3], whole[:, 3:4], whole[:, 4:]


def _subjects(
    world: World, level: int, sprite: Tensor, other: Tensor, cut: Tensor, joined: bool
) -> tuple[Tensor, Tensor | None]:
    """Drawings [N, 4, h, w] and what they shade [N, 1, h, w], if anything; joined with an `other`."""
    drawings, shades = world.sample(level, sprite), None if world.shadow is None else world.shadow(sprite)
    if joined:
        there = other.clamp(min=0)
        drawings = _join(drawings, world.sample(level, there), other, cut)
        if shades is not None:
            shades = _join(shades, world.shadow(there), other, cut * _narrower(cut))
    return drawings, shades


@functools.cache
def _narrow(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 1.0, 1 / SHADOW_WIDER], device=device)


def _narrower(cut: Tensor) -> Tensor:
    """A line of the drawing in its shadow's wider square."""
    return _narrow(cut.device)


def _join(drawings: Tensor, others: Tensor, other: Tensor, cut: Tensor) -> Tensor:
    """Drawings [N, C, h, w] with `others` [N, C, h, w] of numbers `other` [N] (-1: none) beyond lines `cut` [N, 3]."""
    side = drawings.shape[-1]
    ticks = (torch.arange(side, device=drawings.device) * 2 + 1) / side - 1  # middles of pixels
    beyond = cut[:, :1, None] * ticks + cut[:, 1:2, None] * ticks[:, None] > cut[:, 2:, None]  # [N, h, w]
    beyond &= (other >= 0)[:, None, None]
    return torch.where(beyond[:, None], others, drawings)


def _layer(drawings: Tensor, place: Tensor, colour: Tensor, height: int, width: int, window: Window = WHOLE) -> Tensor:
    """Subjects [N, 4, h, w] put in their places on transparent images -> [N, 4, height, width], alpha multiplied in."""
    layer = _put(drawings, place, height, width, window=window)
    painted = torch.einsum("noc,nchw->nohw", colour, layer[:, :3])
    return torch.cat([painted, layer[:, 3:]], dim=1)


def _shadow(shades: Tensor, place: Tensor, on_floor: Tensor, height: int, width: int, window: Window = WHOLE) -> Tensor:
    """How much light subjects take from what is under them, [N, 1, height, width]; flat at the foot or behind."""
    x, y, size, angle, flip = place.unbind(1)
    flat = on_floor.float()
    put = [x + size * (0.05 + 0.03 * flat), y + size * (0.06 + 0.36 * flat), size * SHADOW_WIDER, angle, flip]
    strength = (0.28 + 0.14 * flat)[:, None, None, None]
    return strength * _put(shades, torch.stack(put, dim=1), height, width, squash=1 - 0.8 * flat, window=window)


def _put(
    drawings: Tensor, place: Tensor, height: int, width: int, squash: Tensor | float = 1.0, window: Window = WHOLE
) -> Tensor:
    """Drawings [N, C, h, w] in their places -> [N, C, height, width]; `squash` [N]: how flat they lie."""
    x, y, size, angle, flip = place.unbind(1)
    side = min(height, width)
    half = side / SIDE * size / 2
    x, y = x * side / SIDE, y * side / SIDE
    cos, sin, wide, high = angle.cos(), angle.sin(), width / side, height / side
    # From canvas coordinates (-1..1) to those of the drawing: shift, stretch, turn back, scale, mirror.
    right, down = (width / 2 - x) / (side / 2), (height / 2 - y) / (side / 2) / squash
    across = torch.stack([cos * wide, sin * high / squash, right * cos + down * sin], dim=1)
    along = torch.stack([-sin * wide, cos * high / squash, -right * sin + down * cos], dim=1)
    ratio = (side / 2 / half)[:, None]
    theta = torch.stack([across * ratio * flip[:, None], along * ratio], dim=1)  # [N, 2, 3]
    grid = F.affine_grid(theta, [len(drawings), 1, height, width], align_corners=False)[:, *window]
    return F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _upload(rows: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Several lists of row numbers in one copy; from pinned memory, since a plain copy would wait for the GPU."""
    joined = torch.cat(rows)
    joined = joined.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else joined
    return joined.split([len(one) for one in rows])

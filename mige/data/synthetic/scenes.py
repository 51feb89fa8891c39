"""Scenes: a background and up to five subjects, as plain numbers; and their drawing, batched, on any device.

Letters: P images, S places for subjects, N images or subjects drawn in one go, H and W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mige.data.synthetic import backgrounds, sprites

SIDE = 128
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

    sprite: int  # its number, see `sprites`
    x: float  # centre, px
    y: float
    size: float  # side of its square, px; the drawing fills 0.92 of it
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


def draw(scenes: Scenes, device: torch.device | str = "cpu", side: int = SIDE) -> Tensor:
    """Images of P scenes, float32 [P, 3, side, side] in [-1, 1], drawn on `device`.

    Everything that decides the shapes of the work is read on the CPU, so that a GPU is never waited for.
    """
    device = torch.device(device)
    kinds = scenes.background.unique().tolist()
    there, big = scenes.sprite >= 0, scenes.place[..., 2] > sprites.BIG_FROM  # [P, S]
    layers = [(sheet, slot) for slot in range(MAX_SUBJECTS) for sheet in range(2)]
    chosen = [scenes.background == kind for kind in kinds]
    chosen += [(there & (~big if sheet else big))[:, slot] for sheet, slot in layers]
    rows = _upload([one.nonzero().flatten() for one in chosen], device)
    canvas = torch.empty(len(scenes.background), 3, side, side, device=device)
    variant, place, colour, sprite, other, cut = (
        t.to(device, non_blocking=True)
        for t in (scenes.variant, scenes.place, scenes.colour, scenes.sprite, scenes.other, scenes.cut)
    )
    joined = (scenes.other >= 0).any(dim=0).tolist()  # in which slots
    for kind, here in zip(kinds, rows[: len(kinds)], strict=True):
        canvas[here] = backgrounds.draw(kind, variant[here], side)
    sheets = sprites.sheets(device)
    for (sheet, slot), here in zip(layers, rows[len(kinds) :], strict=True):
        if len(here):
            drawings = sheets[sheet][sprite[here, slot]]
            if joined[slot]:
                drawings = _join(drawings, sheets[sheet], other[here, slot], cut[here, slot])
            layer = _layer(drawings, place[here, slot], colour[here, slot], side)
            canvas[here] = canvas[here] * (1 - layer[:, 3:]) + layer[:, :3]
    return canvas * 2 - 1


def _join(drawings: Tensor, sheet: Tensor, other: Tensor, cut: Tensor) -> Tensor:
    """Drawings [N, 4, h, w] with those of numbers `other` [N] (-1: none) beyond lines `cut` [N, 3]."""
    side = drawings.shape[-1]
    ticks = (torch.arange(side, device=drawings.device) * 2 + 1) / side - 1  # middles of pixels
    beyond = cut[:, :1, None] * ticks + cut[:, 1:2, None] * ticks[:, None] > cut[:, 2:, None]  # [N, h, w]
    beyond &= (other >= 0)[:, None, None]
    return torch.where(beyond[:, None], sheet[other.clamp(min=0)], drawings)


def _layer(drawings: Tensor, place: Tensor, colour: Tensor, side: int) -> Tensor:
    """Subjects [N, 4, h, w] put in their places on transparent images -> [N, 4, side, side], alpha multiplied in."""
    x, y, size, angle, flip = place.unbind(1)
    half = side / SIDE * size / 2
    x, y = x * side / SIDE, y * side / SIDE
    cos, sin = angle.cos(), angle.sin()
    # From canvas coordinates (-1..1) to those of the drawing: shift, turn back, scale, mirror.
    across = torch.stack([cos, sin, (side / 2 - x) / (side / 2) * cos + (side / 2 - y) / (side / 2) * sin], dim=1)
    down = torch.stack([-sin, cos, -(side / 2 - x) / (side / 2) * sin + (side / 2 - y) / (side / 2) * cos], dim=1)
    ratio = (side / 2 / half)[:, None]
    theta = torch.stack([across * ratio * flip[:, None], down * ratio], dim=1)  # [N, 2, 3]
    grid = F.affine_grid(theta, [len(drawings), 4, side, side], align_corners=False)
    layer = F.grid_sample(drawings, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    painted = torch.einsum("noc,nchw->nohw", colour, layer[:, :3])
    return torch.cat([painted, layer[:, 3:]], dim=1)


def _upload(rows: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Several lists of row numbers in one copy; from pinned memory, since a plain copy would wait for the GPU."""
    joined = torch.cat(rows)
    joined = joined.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else joined
    return joined.split([len(one) for one in rows])

"""What the worlds differ in: their subjects, their backgrounds, and how large an image is."""

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mige.data.synthetic import backgrounds, scenery, sprites, styles

Frame = tuple[float, float]
"""Width and height of an image in units, of which its shorter side has 128; scenes are laid out in units."""
SQUARE: Frame = (128.0, 128.0)


@dataclass(frozen=True)
class World:
    """The subjects and backgrounds of a world, as functions, so that a world is cheap to hand to a worker process.

    Attributes:
        side: shorter side of an image, px. shapes: heights and widths of images, px, the square first.
        splits: numbers of subjects by what training shows of them, "seen" first.
        names: what the instruction calls each subject. named: which can be brought in by a name. known: which of those
            in an image may be called by a name. is_asymmetric: whether its mirror image differs visibly.
        sample: (level, numbers int64 [N]) -> drawings float32 [N, 4, h, w], colours times alpha, in [0, 1].
        upto: the size, in units, up to which a subject is drawn from each level but the last.
        shadow: numbers -> float32 [N, 1, h, w], what a subject shades; None for a world without shadows.
        phrases: where something is that stands before each background. plain: which are of one colour; white: which
            of these is white, grey: which is grey. floors: on which shadows lie flat.
        draw: (kind, variants float [N, 12], height, width) -> float32 [N, 3, height, width] in [0, 1].
    """

    key: str
    side: int
    shapes: tuple[tuple[int, int], ...]
    names: Callable[[], Sequence[str]]
    named: Callable[[], Sequence[int]]
    known: Callable[[], Collection[int]]
    splits: Callable[[], dict[str, tuple[int, ...]]]
    is_asymmetric: Callable[[int], bool]
    sample: Callable[[int, Tensor], Tensor]
    upto: tuple[float, ...]
    shadow: Callable[[Tensor], Tensor] | None
    phrases: tuple[str, ...]
    plain: tuple[int, ...]
    white: int
    grey: int
    floors: frozenset[int]
    draw: Callable[[int, Tensor, int, int], Tensor]


def frame(height: int, width: int) -> Frame:
    """The frame of images of so many px."""
    unit = min(height, width) / 128
    return width / unit, height / unit


@functools.cache
def _first_known() -> frozenset[int]:
    return frozenset(sprites.split()[0])


def _first_named() -> tuple[int, ...]:
    return sprites.split()[0]


def _first_splits() -> dict[str, tuple[int, ...]]:
    return dict(zip(("seen", "unseen"), sprites.split(), strict=True))


def _first_is_asymmetric(number: int) -> bool:
    return sprites.is_asymmetric()[number]


def _first_sample(level: int, numbers: Tensor) -> Tensor:
    return sprites.sheets(torch.device(numbers.device))[1 - level][numbers]


def _first_draw(kind: int, variants: Tensor, height: int, width: int) -> Tensor:
    if height != width:
        raise ValueError(f"the first world's images are square, got {height} x {width}")
    return backgrounds.draw(kind, variants, height)


FIRST = World(
    key="first",
    side=128,
    shapes=((128, 128),),
    names=sprites.names,
    named=_first_named,
    known=_first_known,
    splits=_first_splits,
    is_asymmetric=_first_is_asymmetric,
    sample=_first_sample,
    upto=(float(sprites.BIG_FROM),),
    shadow=None,
    phrases=backgrounds.PHRASES,
    plain=backgrounds.PLAIN,
    white=backgrounds.PLAIN_WHITE,
    grey=backgrounds.PLAIN[-1],
    floors=frozenset(),
    draw=_first_draw,
)
"""OpenMoji alone on flat backgrounds, 128 px."""
SECOND = World(
    key="second",
    side=256,
    shapes=((256, 256), (224, 288), (288, 224), (192, 336), (336, 192)),
    names=styles.names,
    named=styles.named,
    known=styles.known,
    splits=styles.split,
    is_asymmetric=styles.is_asymmetric,
    sample=styles.sample,
    upto=styles.UPTO,
    shadow=styles.shadow,
    phrases=scenery.PHRASES,
    plain=scenery.PLAIN,
    white=scenery.PLAIN_WHITE,
    grey=scenery.PLAIN[-1],
    floors=scenery.FLOORS,
    draw=scenery.draw,
)
"""Four hands on shaded backgrounds, 256 px and shapes of as many or nearly as many tokens."""
WORLDS = {world.key: world for world in (FIRST, SECOND)}

"""Whom a subject of the second world is told from: 64 candidates, most of which look nearly like it."""

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mige.data.synthetic import styles
from mige.data.synthetic.scenes import SWAPS, Placed, Scene

CANDIDATES = 64
LOOKALIKES = 40
"""Drawings of the subject's style that look most like it; a few fewer where other candidates take their places."""
_CUTS = (0.0, 90.0, 180.0, 270.0)


def candidates(scene: Scene, subject: Placed) -> list[Placed]:
    """The subject, then 63 others of its size at its place; the same at every call.

    In this order, as far as there are any: its name in the other styles; the subject with one half of its nearest
    look-alike (left, right, upper, lower); its mirror image; itself in other colours; drawings of its style that look
    like it; any others. None of what the scene shows beside it.
    """
    shown = {s.sprite for s in scene.subjects}
    name, _ = styles.drawings()[subject.sprite]
    likes = [number for number in _lookalikes(subject.sprite) if number not in shown]
    same = [n for n, called in enumerate(styles.names()) if called == name and n != subject.sprite]
    found = [replace(subject, sprite=number) for number in same]
    if subject.other < 0:
        found += [replace(subject, other=likes[0], cut=(towards, 0.0)) for towards in _CUTS]
    if styles.is_asymmetric(subject.sprite):
        found.append(replace(subject, flip=not subject.flip, angle=-subject.angle))
    found += [replace(subject, colour=swap) for swap in SWAPS[1:4] if _recoloured(subject, swap)]
    found += [replace(subject, sprite=number) for number in likes[:LOOKALIKES]]
    used = {one.sprite for one in found} | shown
    rest = np.random.default_rng([1, subject.sprite]).permutation(len(styles.drawings())).tolist()
    found += [replace(subject, sprite=number) for number in rest if number not in used]
    return [subject, *found[: CANDIDATES - 1]]


def _recoloured(subject: Placed, swap: np.ndarray) -> bool:
    """Whether exchanged colours can be seen."""
    cell = styles.sample(0, torch.tensor([subject.sprite]))[0, :3]
    now, then = (torch.einsum("oc,chw->ohw", torch.from_numpy(m), cell) for m in (subject.colour, swap))
    return (now - then).abs().mean().item() > 0.03


@functools.lru_cache(maxsize=4096)
def _lookalikes(number: int) -> tuple[int, ...]:
    """All drawings of other names in this one's style, the most alike first."""
    name, style = styles.drawings()[number]
    numbers, seen = _views(style)
    apart = (seen - seen[numbers.index(number)]).square().sum(dim=1)
    order = apart.argsort(stable=True).tolist()
    return tuple(numbers[i] for i in order if styles.names()[numbers[i]] != name)


@functools.cache
def _views(style: str) -> tuple[list[int], Tensor]:
    """Numbers of a style's drawings and what they look like on white, float32 [M, 3 x 12 x 12]."""
    numbers = [n for n, (_, its) in enumerate(styles.drawings()) if its == style]
    small = torch.stack([styles.thumbnail(number, 12) for number in numbers])
    return numbers, (small[:, :3] + 1 - small[:, 3:]).flatten(1)

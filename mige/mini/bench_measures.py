"""What an answer to a case of the mini-bench is worth.

Every case has one right answer, so the measures need no other network: how far the image is from the answer inside
and outside what the instruction changes, which of 64 subjects is at the requested place, which of 24 backgrounds it is.

Letters: N images, K candidates, P pixels of a square, H and W pixels.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mige.data.synthetic import backgrounds, sprites, tasks
from mige.data.synthetic.cases import SEED
from mige.data.synthetic.scenes import SIDE, Placed, Scene, Scenes, draw

CANDIDATES = 64
BY_REFERENCE = ("one_reference", "two_references", "reference_and_name", "add_by_reference",
                "add_by_reference_relative", "replace_by_reference")  # fmt: skip
NEW_BACKGROUND = ("text_to_image", "one_reference", "two_references", "reference_and_name", "background")
SHARES = ("success", "identity", "identity_1", "identity_2", "background")
MEASURES = (*SHARES, "l1_inside", "l1_outside", "l1_subjects")

_CHANGED, _MARGIN = 0.02, 2  # what differs by more (in [0, 1]) is changed, and so is what lies at most 2 px from it
_OUTSIDE = 0.03  # most mean change outside that a successful edit makes
_EXAMPLES, _CELLS, _BINS = 32, 16, 4  # of each background; raster of its colours; steps of a colour in its histogram


def measure(case: tasks.Case, outputs: Tensor, target: Tensor, source: Tensor | None) -> list[dict[str, float]]:
    """What each of N images that answer one case is worth.

    Args:
        outputs: float [N, 3, 128, 128] in [-1, 1]. target, source: [3, 128, 128] as `draw` gives them; source None
            where nothing is edited.

    Returns for every image, as far as the case asks for it:
        l1_inside, l1_outside: mean difference from the answer in [0, 1], in what the instruction changes and elsewhere;
        success: 1 if the difference inside is less than half of that of the source, and outside below 0.03;
        l1_subjects: the same difference where the answer's subjects are;
        identity, and identity_1, identity_2 of two references: 1 if `retrieve` finds the true subject;
        background: 1 if `nearest_background` is the true one.
    A measure of an empty region is left out.
    """
    outputs = (outputs / 2 + 0.5).clamp(0, 1)
    distance = (outputs - (target / 2 + 0.5)).abs().mean(dim=1)  # [N, H, W]
    _, covered = _cut_out([case.target], target.device)
    scores = {"l1_subjects": _mean(distance, covered[0, 0] > 0.5)}
    if source is not None:
        scores |= _edit_scores(case, distance, target, source)
    if case.kind in BY_REFERENCE:
        found = [retrieve(case.target, subject, outputs) for subject in case.asked]
        scores |= {f"identity_{i}": one for i, one in enumerate(found, start=1)} if len(found) > 1 else {}
        scores["identity"] = torch.stack(found).mean(dim=0)
    if case.kind in NEW_BACKGROUND:
        scores["background"] = (nearest_background(outputs, covered[0, 0]) == case.target.background).float()
    lists = {name: values.tolist() for name, values in scores.items()}
    return [{name: v[n] for name, v in lists.items() if not math.isnan(v[n])} for n in range(len(outputs))]


def _edit_scores(case: tasks.Case, distance: Tensor, target: Tensor, source: Tensor) -> dict[str, Tensor]:
    changed = changed_region(source, target)
    inside, outside = _mean(distance, changed), _mean(distance, ~changed)
    scores = {"l1_inside": inside, "l1_outside": outside}
    if case.kind != "background":
        copied = _mean(((source - target) / 2).abs().mean(dim=0)[None], changed)
        success = (inside < copied / 2) & ~(outside >= _OUTSIDE)
        scores["success"] = torch.where(copied.isnan(), copied, success.float())
    return scores


def changed_region(source: Tensor, target: Tensor) -> Tensor:
    """Where two images [3, H, W] in [-1, 1] differ by more than 0.02 of the range, and 2 px around: bool [H, W]."""
    changed = ((source - target).abs() / 2).amax(dim=0) > _CHANGED
    return F.max_pool2d(changed[None].float(), 2 * _MARGIN + 1, stride=1, padding=_MARGIN)[0] > 0


def _mean(values_NHW: Tensor, where_HW: Tensor) -> Tensor:
    """Mean over a region, [N]; NaN for an empty one."""
    return values_NHW[:, where_HW].mean(dim=1)


def _cut_out(scenes: Sequence[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    """The subjects of scenes without background: colours times alpha [N, 3, H, W] and alpha [N, 1, H, W], in [0, 1]."""
    grounds = (backgrounds.PLAIN_WHITE, backgrounds.PLAIN[-1])  # what shines through differs as the two greys do
    scenes = [replace(scene, background=ground, variant=backgrounds.MIDDLE) for ground in grounds for scene in scenes]
    light, dark = (draw(Scenes.stack(scenes), device) / 2 + 0.5).chunk(2)
    white, grey = (draw(Scenes.stack([Scene(g, backgrounds.MIDDLE)]), device)[:, :, :1, :1] / 2 + 0.5 for g in grounds)
    through = ((light - dark) / (white - grey)).mean(dim=1, keepdim=True)
    return light - white * through, 1 - through


def candidates(scene: Scene, subject: Placed) -> list[int]:
    """The subject's number, then 63 others of its split that the scene does not show; the same at every call."""
    split = next(half for half in sprites.split() if subject.sprite in half)
    shown = {s.sprite for s in scene.subjects}
    others = [number for number in split if number not in shown]
    rng = np.random.default_rng([SEED, subject.sprite])
    return [subject.sprite, *rng.permutation(others)[: CANDIDATES - 1].tolist()]


def retrieve(scene: Scene, subject: Placed, outputs: Tensor) -> Tensor:
    """Whether the subject, of 64 candidates, fits an image best at its place: float [N], 1 for found.

    The rule: a candidate, as large, turned and coloured as the subject, is laid over a background whose colours run
    evenly (a plane a channel, the one that fits best); what counts is the mean squared difference in the subject's
    square, less what other subjects of the scene cover. So the background's variant is free.

    Args:
        scene: the answer, of which the subject is one. outputs: float [N, 3, 128, 128] in [0, 1].
    """
    device = outputs.device
    colour, alpha = _cut_out([Scene(0, scene.variant, (replace(subject, sprite=number),))
                              for number in candidates(scene, subject)], device)  # fmt: skip
    _, others = _cut_out([scene.without(subject)], device)
    line = torch.arange(SIDE, device=device) + 0.5
    y, x = torch.meshgrid((line - subject.y) / subject.size, (line - subject.x) / subject.size, indexing="ij")
    seen = (x.abs() < 0.5) & (y.abs() < 0.5) & (others[0, 0] < 0.05)
    if not seen.any():
        return torch.zeros(len(outputs), device=device)
    plane = torch.stack([torch.ones_like(x), x, y], dim=-1)[seen]  # [P, 3]
    error = fit_errors(colour[:, :, seen], alpha[:, 0, seen], plane, outputs[:, :, seen])
    return (error.argmin(dim=1) == 0).float()


def fit_errors(colour: Tensor, alpha: Tensor, plane: Tensor, outputs: Tensor) -> Tensor:
    """How badly candidates over the plane of colours that fits best explain images: mean squares, float64 [N, K].

    Args:
        colour: [K, 3, P], times alpha. alpha: [K, P]. plane: [P, 3], what the plane is made of. outputs: [N, 3, P].
    """
    design = ((1 - alpha)[..., None] * plane).double()  # [K, P, 3]
    rest = (outputs[:, None] - colour[None]).double()  # [N, K, 3, P]
    normal = design.mT @ design + 1e-6 * torch.eye(3, device=design.device, dtype=torch.double)
    solution = torch.linalg.solve(normal, design.mT @ rest.mT)  # [N, K, 3, 3]
    return (rest.mT - design @ solution).square().mean(dim=(2, 3))


def nearest_background(outputs: Tensor, covered: Tensor) -> Tensor:
    """The kind of background of images, int64 [N]: that of the nearest of 32 examples of each of the 24 kinds.

    Compared are the mean colours of 16 x 16 cells and the histogram of colours, without what subjects cover.

    Args:
        outputs: float [N, 3, 128, 128] in [0, 1]. covered: float [128, 128], the subjects' alpha.
    """
    free = (covered < 0.05).float()
    if not free.any():
        return torch.full((len(outputs),), -1, device=outputs.device)
    cells, histogram = _examples(outputs.device)
    own_cells, own_histogram = colour_features(outputs, free)
    weight = F.adaptive_avg_pool2d(free[None, None], _CELLS)[0]
    weight = weight / weight.sum()
    apart = ((own_cells[:, None] - cells[None]).abs() * weight).sum(dim=(3, 4)).mean(dim=2)
    apart = apart + 0.25 * (own_histogram[:, None] - histogram[None]).abs().sum(dim=2)
    return apart.argmin(dim=1) // _EXAMPLES


@functools.cache
def _examples(device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of 32 variants of every kind of background, in the order of the kinds."""
    variants = torch.from_numpy(np.random.default_rng(SEED).random((_EXAMPLES, backgrounds.VARIANT), np.float32))
    drawn = (backgrounds.draw(kind, variants.to(device), SIDE) for kind in range(backgrounds.KINDS))
    free = torch.ones(SIDE, SIDE, device=device)
    cells, histograms = zip(*(colour_features(outputs, free) for outputs in drawn), strict=True)
    return torch.cat(cells), torch.cat(histograms)


def colour_features(outputs: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Mean colours of cells [N, 3, 16, 16] and shares of colours [N, 64] of what is free (float [H, W], 0 or 1)."""
    share = F.adaptive_avg_pool2d(free[None, None], _CELLS)
    cells = F.adaptive_avg_pool2d(outputs * free, _CELLS) / share.clamp_min(1e-6)
    place = (outputs[:, :, free > 0] * (_BINS - 1)).clamp(0, _BINS - 1)  # [N, 3, P]
    steps = torch.arange(_BINS, device=outputs.device)[:, None]
    red, green, blue = ((1 - (channel[:, None] - steps).abs()).clamp_min(0) for channel in place.unbind(1))
    histogram = torch.einsum("nrp,ngp,nbp->nrgb", red, green, blue) / place.shape[2]
    return cells, histogram.flatten(1)

"""What an answer to a case of mini-bench 2, of the second world, is worth.

It differs from mini-bench's measures where those misjudge: a change may lie up to 2 px off, outside of it the worst
place counts and not the mean, a subject is told from 64 that look like it, and there are two measures of detail.

Letters: N images, K candidates, P pixels, H and W pixels.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mige.data.synthetic import tasks
from mige.data.synthetic.backgrounds import VARIANT
from mige.data.synthetic.cases import DEVELOPMENT_SEED
from mige.data.synthetic.scenes import SIDE, WHOLE, Placed, Scene, Window, cut_out
from mige.data.synthetic.world import SECOND
from mige.mini.bench_measures import BY_REFERENCE, NEW_BACKGROUND, changed_region, colour_features, fit_errors
from mige.mini.hard_negatives import candidates

SHARES = ("success", "identity", "identity_1", "identity_2", "background")
MEASURES = (*SHARES, "l1_inside", "l1_outside", "worst_block", "l1_subjects", "edges")

SHIFT = 2  # px that a change may lie off
BLOCK, STRIDE, FREE = 16, 8, 0.25  # px of a block outside, px between blocks; the least share of it that is outside
WORST = 0.12
"""The largest mean difference, of the range, in any block outside that a successful edit makes."""
_EXAMPLES, _CELLS, _SMALL = 16, 16, 2  # examples of a background; raster of its colours; how much smaller they are


def measure(
    case: tasks.Case, shape: tuple[int, int], outputs: Tensor, target: Tensor, source: Tensor | None
) -> list[dict[str, float]]:
    """What each of N images that answer one case is worth.

    Args:
        shape: height and width. outputs: float [N, 3, H, W] in [-1, 1]. target, source: [3, H, W] as `draw` gives them;
            source None where nothing is edited.

    Returns for every image, as far as the case asks for it:
        l1_inside: mean difference from the answer in [0, 1] in what the instruction changes, at the best shift of up to
            2 px; l1_outside: elsewhere, unshifted; worst_block: the largest mean of a block of 16 x 16 px there;
        success: 1 if l1_inside is less than half of the source's, and worst_block below 0.12;
        l1_subjects: the difference where the answer's subjects are; edges: their gradients' difference, as a share of
            the answer's gradients: 0 for the answer, about 1 for a blur;
        identity, and identity_1, identity_2 of two references: 1 if no candidate fits better than the true subject;
        background: 1 if the nearest example is of the right kind.
    A measure of an empty region is left out.
    """
    outputs, truth = (outputs / 2 + 0.5).clamp(0, 1), target / 2 + 0.5
    covered, shaded = _covered(case.target, shape, target.device)
    subjects = covered > 0.5
    scores = {
        "l1_subjects": _mean((outputs - truth).abs().mean(dim=1), subjects),
        "edges": _edges(outputs, truth, subjects),
    }
    if source is not None:
        scores |= _edit_scores(case, outputs, truth, source / 2 + 0.5)
    if case.kind in BY_REFERENCE:
        found = [retrieve(case.target, subject, outputs) for subject in case.asked]
        scores |= {f"identity_{i}": one for i, one in enumerate(found, start=1)} if len(found) > 1 else {}
        scores["identity"] = torch.stack(found).mean(dim=0)
    if case.kind in NEW_BACKGROUND:
        scores["background"] = (nearest_background(outputs, shaded) == case.target.background).float()
    lists = {name: values.tolist() for name, values in scores.items()}
    return [{name: v[n] for name, v in lists.items() if not math.isnan(v[n])} for n in range(len(outputs))]


def _edit_scores(case: tasks.Case, outputs: Tensor, truth: Tensor, source: Tensor) -> dict[str, Tensor]:
    changed = changed_region(source * 2 - 1, truth * 2 - 1)
    inside, worst = best_shift(outputs, truth, changed), worst_block(outputs, truth, ~changed)
    scores = {"l1_inside": inside, "worst_block": worst}
    scores["l1_outside"] = _mean((outputs - truth).abs().mean(dim=1), ~changed)
    if case.kind != "background":
        copied = best_shift(source[None], truth, changed)
        success = (inside < copied / 2) & ~(worst >= WORST)  # nothing outside: nothing damaged
        scores["success"] = torch.where(copied.isnan(), copied, success.float())
    return scores


def best_shift(outputs: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """The least mean difference in a region over all shifts of up to 2 px, [N]; NaN for an empty region.

    outputs: [N, 3, H, W] in [0, 1]. truth: [3, H, W]. where: bool [H, W].
    """
    height, width = truth.shape[1:]
    padded = F.pad(outputs, (SHIFT,) * 4, mode="replicate")
    windows = ((dy, dx) for dy in range(2 * SHIFT + 1) for dx in range(2 * SHIFT + 1))
    errors = [
        _mean((padded[:, :, dy : dy + height, dx : dx + width] - truth).abs().mean(dim=1), where) for dy, dx in windows
    ]
    return torch.stack(errors).amin(dim=0)


def worst_block(outputs: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """The largest mean difference of a block in a region, [N]; NaN where no block has a quarter of its pixels in it."""
    free = where.float()[None]
    error = (outputs - truth).abs().mean(dim=1) * free
    share = F.avg_pool2d(free, BLOCK, STRIDE)
    blocks = F.avg_pool2d(error, BLOCK, STRIDE) / share.clamp(min=FREE)
    counted = (share >= FREE).flatten()
    if not counted.any():
        return torch.full((len(outputs),), torch.nan, device=outputs.device)
    return blocks.flatten(1)[:, counted].amax(dim=1)


def _edges(outputs: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    """Difference of the brightness's gradients in a region, as a share of the truth's, [N]."""
    own, right = _gradients(outputs), _gradients(truth[None])
    return _mean((own - right).abs().sum(dim=1), where) / _mean(right.abs().sum(dim=1), where)


def _gradients(images: Tensor) -> Tensor:
    """Differences across and down of brightness, [N, 2, H, W]."""
    grey = F.pad(images.mean(dim=1, keepdim=True), (0, 1, 0, 1), mode="replicate")
    return torch.cat([grey[:, :, :-1, 1:] - grey[:, :, :-1, :-1], grey[:, :, 1:, :-1] - grey[:, :, :-1, :-1]], dim=1)


def _mean(values_NHW: Tensor, where_HW: Tensor) -> Tensor:
    """Mean over a region, [N]; NaN for an empty one."""
    return values_NHW[:, where_HW].mean(dim=1)


def _covered(
    scene: Scene, shape: tuple[int, int], device: torch.device, window: Window = WHOLE
) -> tuple[Tensor, Tensor]:
    """How much a scene's subjects cover, alone and with their shadows: float [H, W] each, in [0, 1]."""
    if not scene.subjects:
        nothing = torch.zeros(shape, device=device)[window]
        return nothing, nothing
    flat = scene.background in SECOND.floors
    _, alpha, shade = cut_out(scene.subjects, shape, device, SECOND, on_floor=flat, window=window)
    through = (1 - alpha).prod(dim=0)[0]
    return 1 - through, 1 - through * (1 - shade).prod(dim=0)[0]


def retrieve(scene: Scene, subject: Placed, outputs: Tensor) -> Tensor:
    """Whether the subject, of 64 candidates, fits an image best at its place: float [N], 1 for found.

    As mini-bench's rule: a candidate with its shadow lies over a plane of colours that fits best; what counts is the
    mean squared difference in the subject's square, less what other subjects of the scene cover.

    Args:
        scene: the answer, of which the subject is one. outputs: float [N, 3, H, W] in [0, 1].
    """
    shape, device, window = tuple(outputs.shape[2:]), outputs.device, _square(subject, outputs)
    _, others = _covered(scene.without(subject), shape, device, window)
    free = others < 0.05
    if not free.any():
        return torch.zeros(len(outputs), device=device)
    flat = scene.background in SECOND.floors
    colour, alpha, shade = cut_out(candidates(scene, subject), shape, device, SECOND, on_floor=flat, window=window)
    alpha = 1 - (1 - alpha) * (1 - shade)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n, device=device) for n in free.shape), indexing="ij")
    plane = torch.stack([torch.ones_like(x), x, y], dim=-1)[free]  # [P, 3]
    error = fit_errors(colour[:, :, free], alpha[:, 0, free], plane, outputs[:, :, *window][:, :, free])
    return (error[:, 0] <= error.amin(dim=1)).float()


def _square(subject: Placed, outputs: Tensor) -> Window:
    """The part of a subject's square that lies in images [N, 3, H, W]."""
    unit = min(outputs.shape[2:]) / SIDE
    spans = ((at - subject.size / 2, at + subject.size / 2) for at in (subject.y, subject.x))
    return tuple(slice(max(round(low * unit), 0), max(round(high * unit), 0)) for low, high in spans)


def nearest_background(outputs: Tensor, covered: Tensor) -> Tensor:
    """The kind of background of images, int64 [N]: that of the nearest of 16 examples of each of the 28 kinds.

    Compared are the mean colours of 16 x 16 cells and the histogram of colours, without what subjects cover, at half
    size.

    Args:
        outputs: float [N, 3, H, W] in [0, 1]. covered: float [H, W], the subjects' alpha.
    """
    free = (F.avg_pool2d(covered[None, None], _SMALL)[0, 0] < 0.02).float()
    if not free.any():
        return torch.full((len(outputs),), -1, device=outputs.device)
    cells, histogram = _examples(outputs.device, tuple(free.shape))
    own_cells, own_histogram = colour_features(F.avg_pool2d(outputs, _SMALL), free)
    weight = F.adaptive_avg_pool2d(free[None, None], _CELLS)[0]
    weight = weight / weight.sum()
    apart = ((own_cells[:, None] - cells[None]).abs() * weight).sum(dim=(3, 4)).mean(dim=2)
    apart = apart + 0.25 * (own_histogram[:, None] - histogram[None]).abs().sum(dim=2)
    return apart.argmin(dim=1) // _EXAMPLES


@functools.cache
def _examples(device: torch.device, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Features of 16 variants of every kind of background, in the order of the kinds."""
    numbers = np.random.default_rng(DEVELOPMENT_SEED).random((_EXAMPLES, VARIANT), np.float32)
    variants, free = torch.from_numpy(numbers).to(device), torch.ones(shape, device=device)
    kinds = range(len(SECOND.phrases))
    cells, histograms = zip(*(colour_features(SECOND.draw(k, variants, *shape), free) for k in kinds), strict=True)
    return torch.cat(cells), torch.cat(histograms)

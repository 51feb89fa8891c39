"""Features of images and texts, each computed once and kept; an image is opened once for all networks.

Opening and resizing takes longer than the networks do, so processes on all cores do it ahead of them; threads wait for
each other's Python. What they hand over is bytes, a quarter of what floats take: those are made on the device.
"""

import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mige.evaluation.backbones import Backbone, Transform
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.views import View
from mige.utils.files import write_bytes
from mige.utils.images import BadImageError
from mige.utils.progress import Progress

_CHUNK = 16  # images that a process hands over together: all that wait are in shared memory, some hundred MB
_PER_PROCESS = 64  # images that are worth starting one for
_SAVE_EVERY = 50  # batches; what a kill loses at most


class Features:
    """Features of one backbone, kept in a file from one run to the next.

    An image's key is the hash of its file, a text's that of its letters, so that nothing stale is ever read; the file
    is named after the backbone's weights.
    """

    def __init__(self, backbone: Backbone, folder: Path):
        name = re.sub(r"[^a-z0-9.-]", "", backbone.name.lower().replace(" ", "-"))
        self.backbone = backbone
        self.path = folder / f"{name}-{backbone.fingerprint}.safetensors"
        self.known = _read_cache(self.path)
        self.key_of: dict[View | str, str] = {}

    def __getitem__(self, what: View | str) -> Tensor:
        return self.known[self.key_of[what]]

    def lacks(self, what: View | str) -> bool:
        """Whether the features of an image or text, whose key is known, are still to be computed."""
        return self.key_of[what] not in self.known

    def keep(self, of: Sequence[View | str], features_BD: Tensor) -> None:
        """Take in what the backbone gave of them, float32 [B, D]. Raises BenchmarkError that names a NaN's image."""
        for one, features in zip(of, features_BD, strict=True):
            if not features.isfinite().all():
                name = one.path if isinstance(one, View) else one
                raise BenchmarkError(f"{name}: {self.backbone.name} gives NaN features; check its weights")
            self.known[self.key_of[one]] = features.clone()

    def save(self) -> None:
        """Write the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, save(self.known))


def compute_texts(features: Features, texts: Iterable[str], batch: int) -> None:
    """See that the features of these texts are known."""
    features.key_of |= {one: "text " + hashlib.sha256(one.encode()).hexdigest() for one in texts}
    todo = [one for one in dict.fromkeys(texts) if features.lacks(one)]
    label = f"{features.backbone.name}, captions"
    with Progress(total=len(todo), unit="caption", desc=label, disable=not todo) as bar:
        for first in range(0, len(todo), batch):
            part = todo[first : first + batch]
            features.keep(part, features.backbone.texts(part))
            bar.update(len(part))
    if todo:
        features.save()


def compute_images(wanted: Mapping[Features, Iterable[View]], batch: int) -> None:
    """See that each backbone knows the features of the images wanted of it; each image is opened once for all.

    A kill loses at most the last fifty batches. Raises BadImageError for a file that cannot be read.
    """
    wanted = {features: list(dict.fromkeys(some)) for features, some in wanted.items()}
    views = list(dict.fromkeys(view for some in wanted.values() for view in some))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ended before processes start
        keys = dict(zip(views, pool.map(View.key, views), strict=True))
    lacking: dict[View, list[int]] = {}
    for place, (features, some) in enumerate(wanted.items()):
        features.key_of |= {view: f"picture {keys[view]}" for view in some}
        once = {features.key_of[view]: view for view in some if features.lacks(view)}
        for view in once.values():
            lacking.setdefault(view, []).append(place)
    stores, todo = list(wanted), list(lacking)
    images = _Images(list(lacking.items()), [features.backbone.transform for features in stores])
    workers, chunk = min(os.cpu_count() or 1, len(todo) // _PER_PROCESS), min(batch, _CHUNK)
    loader = iter(DataLoader(images, chunk, num_workers=workers, collate_fn=_together))
    names = " and ".join(features.backbone.name for features in stores)
    with Progress(total=len(todo), desc=names, unit="image", disable=not todo) as bar:
        for n in itertools.count(1):
            if not (chunks := list(itertools.islice(loader, max(1, batch // chunk)))):
                break
            if error := next((one for one in chunks if isinstance(one, BadImageError)), None):
                raise error
            for place, features in enumerate(stores):
                _encode(features, [one[place] for one in chunks if place in one], todo)
            bar.update(min(batch, len(todo) - bar.n))
            if n % _SAVE_EVERY == 0 or bar.n == len(todo):
                for features in stores:
                    features.save()
        bar.close()


Chunk = dict[int, tuple[list[int], Tensor]]
"""By the backbone's place: which images these are, and what it takes of them, uint8 [B, S, S, 3]."""


def _encode(features: Features, chunks: Sequence[tuple[list[int], Tensor]], views: Sequence[View]) -> None:
    if chunks:
        levels_BSSC = torch.cat([levels for _, levels in chunks])
        features.keep([views[i] for some, _ in chunks for i in some], features.backbone.encode(levels_BSSC))


class _Images(Dataset):
    """Images with the places of the backbones that want them, each as these take it."""

    def __init__(self, wanted: Sequence[tuple[View, Sequence[int]]], transforms: Sequence[Transform]):
        self.wanted, self.transforms = wanted, transforms

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> tuple[int, dict[int, Tensor]] | BadImageError:
        view, places = self.wanted[index]
        try:
            image = view.open()
        except BadImageError as error:  # raised where the user is, as itself
            return error
        return index, {place: self.transforms[place].levels(image) for place in places}


def _together(opened: Sequence[tuple[int, dict[int, Tensor]] | BadImageError]) -> Chunk | BadImageError:
    if error := next((one for one in opened if isinstance(one, BadImageError)), None):
        return error
    places = sorted({place for _, levels in opened for place in levels})
    having = {place: [(index, levels[place]) for index, levels in opened if place in levels] for place in places}
    return {place: ([i for i, _ in some], torch.stack([one for _, one in some])) for place, some in having.items()}


def _read_cache(path: Path) -> dict[str, Tensor]:
    """The kept features; none, with a word on stderr, of a file that is cut or another one: they are computed anew."""
    if not path.exists():
        return {}
    try:
        known = load(path.read_bytes())
        shapes = {tuple(features.shape) for features in known.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise ValueError(f"tensors of shapes {sorted(shapes)}, expected one vector an image or text")
        if strangers := [key for key in known if not re.fullmatch("(picture|text) [0-9a-f]{64}", key)]:
            raise ValueError(f"the key {strangers[0]!r}, expected those of images and texts")
        if not all(features.dtype == torch.float32 and features.isfinite().all() for features in known.values()):
            raise ValueError("features that are no finite float32")
    except (ValueError, SafetensorError) as error:
        print(f"warning: {path}: {error}; its features are computed anew", file=sys.stderr)
        return {}
    return known

"""Features of images and texts, each computed once and kept; an image is opened once for all networks.

Opening and resizing takes longer than the networks do, so it runs on all cores, some batches ahead. What the threads
hand over is bytes: floats are made on the device, where PyTorch's own threads and these would only wait for each other.
"""

import hashlib
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from mige.evaluation.backbones import Backbone
from mige.evaluation.benchmarks.files import BenchmarkError
from mige.evaluation.views import View
from mige.utils.files import write_bytes

_AHEAD = 3  # batches that are opened while one is in the networks
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
    for first in tqdm(range(0, len(todo), batch), desc=f"{features.backbone.name}, captions", disable=not todo):
        part = todo[first : first + batch]
        features.keep(part, features.backbone.texts(part))
    if todo:
        features.save()


def compute_images(wanted: Mapping[Features, Iterable[View]], batch: int) -> None:
    """See that each backbone knows the features of the images wanted of it; each image is opened once for all.

    A kill loses at most the last fifty batches. Raises BadImageError for a file that cannot be read.
    """
    wanted = {features: list(dict.fromkeys(some)) for features, some in wanted.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        views = list(dict.fromkeys(view for some in wanted.values() for view in some))
        keys = dict(zip(views, pool.map(View.key, views), strict=True))
        lacking: dict[View, list[Features]] = {}
        for features, some in wanted.items():
            features.key_of |= {view: f"picture {keys[view]}" for view in some}
            once = {features.key_of[view]: view for view in some if features.lacks(view)}
            for view in once.values():
                lacking.setdefault(view, []).append(features)
        parts = [list(lacking)[first : first + batch] for first in range(0, len(lacking), batch)]
        names = " and ".join(features.backbone.name for features in wanted)
        bar = tqdm(parts, desc=f"{names}, images", disable=not parts)
        for n, (part, opened) in enumerate(zip(bar, _ahead(pool, parts, lacking), strict=True), start=1):
            for features in wanted:
                own = [i for i, view in enumerate(part) if features in lacking[view]]
                if own:
                    levels_BSSC = torch.stack([opened[i][features] for i in own])
                    features.keep([part[i] for i in own], features.backbone.encode(levels_BSSC))
            if n % _SAVE_EVERY == 0 or n == len(parts):
                for features in wanted:
                    features.save()


Opened = dict[Features, Tensor]
"""An image as each backbone takes it, uint8 [S, S, 3]."""


def _ahead(
    pool: ThreadPoolExecutor, parts: Sequence[Sequence[View]], lacking: Mapping[View, Sequence[Features]]
) -> Iterator[list[Opened]]:
    """The images of each part, opened some parts ahead of where they are asked for."""
    queued: deque[list[Future[Opened]]] = deque()
    for part in parts:
        queued.append([pool.submit(_open, view, lacking[view]) for view in part])
        if len(queued) > _AHEAD:
            yield [one.result() for one in queued.popleft()]
    while queued:
        yield [one.result() for one in queued.popleft()]


def _open(view: View, stores: Sequence[Features]) -> Opened:
    image: Image.Image = view.open()
    return {features: features.backbone.transform.levels(image) for features in stores}


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

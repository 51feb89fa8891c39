"""Extracting: every picture of the records through the VAE once, into a store of moments (see `features`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mige.data.latent_store.entries import FileFacts
from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.meta import DTYPES, Meta
from mige.data.latent_store.part import PartWriter
from mige.data.latent_store.store import FeatureStore
from mige.data.records import Finding, Record
from mige.models import vae as latents
from mige.utils import images
from mige.utils.files import absolute
from mige.utils.images import BadImageError

_AT_ONCE = 8  # pictures through the VAE: fixed, as a network's last bits depend on the shape of its input


def distinct_pictures(records: Iterable[Record]) -> dict[Path, str]:
    """Absolute path of every distinct picture (target, source, references) -> the first record that names it."""
    named: dict[Path, str] = {}
    for record in records:
        for path in (record.target, record.source, *record.references):
            if path is not None:
                named.setdefault(Path(absolute(path)), record.where)
    return named


def extract(
    store: FeatureStore,
    vae: AutoencoderKL,
    pictures: Mapping[Path, str],
    *,
    process: int = 0,
    processes: int = 1,
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = False,
) -> list[Finding]:
    """Encode this process's share of the pictures, those that the store lacks or that have changed.

    Args:
        store: made by `create_store` with this VAE; open it again to see what was added.
        pictures: path -> where it comes from (see `distinct_pictures`), the same in all processes, of which this is
            number `process`; every `processes`-th picture is its share.
        batch_size: pictures at a time. Batches are filled up with zeros to one shape, so that any multiple of 8 gives
            the same bits whatever was done before.
        workers: processes that open pictures; 0: none.
        progress: show a bar.

    Returns what could not be encoded, a finding a picture. Raises StoreError if memory is short, OSError if writing
    fails; all batches before are kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    share = list(pictures)[process::processes]
    todo = store.missing(share) + store.changed(share)
    loader = DataLoader(_Pictures(todo, store.meta), batch_size, num_workers=workers, collate_fn=list)
    label = f"share {process + 1} of {processes}" if processes > 1 else None
    findings = []
    with (
        PartWriter(store, process) as part,
        tqdm(total=len(share), initial=len(share) - len(todo), unit="picture", desc=label, disable=not progress) as bar,
    ):
        for batch in loader:
            failed = [(picture.path, picture.error.problem, picture.error.remedy) for picture in batch if picture.error]
            good = [picture for picture in batch if not picture.error]
            rows = _encode(vae, good, batch_size, store.meta)
            finite = np.isfinite(rows).all(axis=(1, 2, 3, 4))
            part.add([(p.path, p.file) for p, kept in zip(good, finite, strict=True) if kept], rows[finite])
            failed += [
                (picture.path, f"its moments are not finite in {store.meta.dtype}", "store float32 or check the VAE")
                for picture, kept in zip(good, finite, strict=True)
                if not kept
            ]
            findings += [Finding(f"{pictures[path]}: {path}", *why) for path, *why in failed]
            bar.update(len(batch))
    return findings


@dataclass(frozen=True)
class _Picture:
    """An opened picture, float32 [3, H, W], and the file it came from; or why it could not be opened."""

    path: Path
    file: FileFacts | None = None
    pixels: Tensor | None = None
    error: BadImageError | None = None


class _Pictures(Dataset):
    def __init__(self, paths: Sequence[Path], meta: Meta):
        self.paths, self.size = paths, (meta.height, meta.width)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> _Picture:
        path = self.paths[index]
        try:
            file = FileFacts.of(path)  # before it is opened: should it be replaced meanwhile, it counts as changed
            pixels = images.to_pixels(images.center_crop(images.open_image(path), *self.size))
        except BadImageError as error:
            return _Picture(path, error=error)
        except OSError as error:
            remedy = "correct the path or its permissions, or fetch the picture"
            return _Picture(path, error=BadImageError(path, f"cannot be read ({error.strerror})", remedy))
        return _Picture(path, file, pixels)


@torch.inference_mode()
def _encode(vae: AutoencoderKL, batch: Sequence[_Picture], batch_size: int, meta: Meta) -> np.ndarray:
    """Rows [len(batch), 2, C, h, w] in the stored dtype."""
    if not batch:
        return np.empty((0, *meta.row), DTYPES[meta.dtype])
    pixels = torch.zeros(batch_size, 3, meta.height, meta.width)
    for place, picture in zip(pixels[: len(batch)], batch, strict=True):
        place.copy_(picture.pixels)
    try:
        moments = [latents.encode(vae, part.to(vae.device)) for part in pixels.split(_AT_ONCE)]
    except torch.OutOfMemoryError as error:
        raise StoreError(f"out of memory with {batch_size} pictures at a time: give a smaller batch size") from error
    rows = torch.cat([torch.stack([m.mean, m.std], dim=1) for m in moments])[: len(batch)].float().cpu().numpy()
    with np.errstate(over="ignore"):  # values beyond float16 become infinite and are reported
        return rows.astype(DTYPES[meta.dtype])

"""Extracting: every image of the records through the VAE once, into a store of moments (see `store`)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mige.data.crops import Crop, as_crops, training_crops
from mige.data.latent_store.entries import ENTRY, FileFacts, make_entry
from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.meta import DTYPES, Meta
from mige.data.latent_store.part import PartWriter
from mige.data.latent_store.store import FeatureStore
from mige.data.records import Issue, Record
from mige.models.vae import encode
from mige.utils import images
from mige.utils.files import absolute
from mige.utils.images import BadImageError

_CHUNK = 8  # images through the VAE: fixed, as a network's last bits depend on the shape of its input


def distinct_crops(records: Iterable[Record]) -> dict[Crop, str]:
    """Every distinct image (target, references) with its crop, by absolute paths -> the first record that names it.

    The source is cropped like the target; in a record without a target, by its own shape.
    """
    named: dict[Crop, str] = {}
    for record in records:
        crops = as_crops(record.references) if record.target is None else training_crops(record)
        for path, like in crops:
            named.setdefault(Crop(_absolute(path), like and _absolute(like)), record.where)
    return named


def extract(
    store: FeatureStore,
    vae: AutoencoderKL,
    named: Mapping[Path | Crop, str],
    *,
    process: int = 0,
    processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    batch_size: int = 8,
    workers: int = 0,
    progress: bool = False,
) -> list[Issue]:
    """Encode this process's share of the images, those that the store lacks or that have changed.

    First all that are cropped by their own shape, then those cropped like one of them, whose shape the store knows by
    then; where that one failed, they are left out.

    Args:
        store: made by `create_store` with this VAE; open it again to see what was added.
        named: image -> where it comes from (see `distinct_crops`), the same in all processes, of which this is number
            `process`; every `processes`-th image is its share.
        wait: waits for all processes; called between the two.
        batch_size: images at a time. Batches are filled up with zeros to one shape, so that any multiple of 8 gives
            the same bits whatever was done before.
        workers: processes that open images; 0: none.
        progress: show a bar.

    Returns what could not be encoded, an issue an image. Raises StoreError if memory is short, OSError if writing
    fails; all batches before are kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    places = dict(zip(as_crops(named), named.values(), strict=True))
    pairs = [crop for crop in places if crop.like is not None]
    issues = []
    for number, crops in enumerate([[crop for crop in places if crop.like is None], pairs][: 2 if pairs else 1]):
        if number == 1:
            wait()
            store = FeatureStore(store.folder, store.meta, Path(store.root))
        jobs = _distinct_jobs(store, crops)[process::processes]
        todo = {*store.missing(job.crop for job in jobs), *store.changed(job.crop for job in jobs)}
        issues += _encode_jobs(
            store,
            vae,
            [job for job in jobs if job.crop in todo],
            places,
            process=process,
            batch_size=batch_size,
            workers=workers,
            bar=dict(
                total=len(jobs),
                initial=len(jobs) - len(todo),
                desc=f"share {process + 1} of {processes}" if processes > 1 else None,
                disable=not progress,
            ),
        )
    return issues


@dataclass(frozen=True)
class _Job:
    """An image to encode. like: width and height of the image that it is cropped like."""

    crop: Crop
    key: bytes
    like: tuple[int, int] | None


def _distinct_jobs(store: FeatureStore, crops: Sequence[Crop]) -> list[_Job]:
    """A job for every row that the store is to have; none for what is cropped like an image that it lacks."""
    sizes = store.image_sizes(list({crop.like for crop in crops if crop.like is not None}))
    jobs = {}
    for crop in crops:
        if crop.like is None or crop.like in sizes:
            like = sizes.get(crop.like)
            key = store.key(crop.path, like)
            jobs.setdefault(key, _Job(crop, key, like))
    return list(jobs.values())


def _encode_jobs(
    store: FeatureStore,
    vae: AutoencoderKL,
    jobs: Sequence[_Job],
    places: Mapping[Crop, str],
    *,
    process: int,
    batch_size: int,
    workers: int,
    bar: dict,
) -> list[Issue]:
    """Encode all into a part of the store; what could not be, as issues."""
    meta, issues = store.meta, []
    loader = DataLoader(_Images(jobs, meta), batch_size, num_workers=workers, collate_fn=list)
    with PartWriter(store.folder, process) as part, tqdm(unit="image", **bar) as shown:
        for batch in loader:
            failed = [(image.job, image.error.message, image.error.hint) for image in batch if image.error]
            good = [image for image in batch if not image.error]
            rows = _encode(vae, good, batch_size, meta)
            finite = np.isfinite(rows).all(axis=(1, 2, 3, 4))
            kept = [(image, row) for image, row, whole in zip(good, rows, finite, strict=True) if whole]
            entries = [make_entry(image.job.key, image.file, image.size, row) for image, row in kept]
            part.add(np.concatenate([np.empty(0, ENTRY), *entries]), rows[finite])
            hint = "store float32 or check the VAE"
            failed += [
                (image.job, f"its moments are not finite in {meta.dtype}", hint)
                for image, whole in zip(good, finite, strict=True)
                if not whole
            ]
            issues += [Issue(f"{places[job.crop]}: {job.crop.path}", *why) for job, *why in failed]
            shown.update(len(batch))
    return issues


@dataclass(frozen=True)
class _Image:
    """An opened image, float32 [3, H, W], its width and height before, and its file; or why it was not opened."""

    job: _Job
    file: FileFacts | None = None
    size: tuple[int, int] | None = None
    pixels: Tensor | None = None
    error: BadImageError | None = None


class _Images(Dataset):
    def __init__(self, jobs: Sequence[_Job], meta: Meta):
        self.jobs, self.fitted = jobs, (meta.height, meta.width)

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> _Image:
        job = self.jobs[index]
        path = job.crop.path
        try:
            file = FileFacts.of(path)  # before it is opened: should it be replaced meanwhile, it counts as changed
            image = images.open_image(path)
            pixels = images.to_pixels(images.center_crop(image, *self.fitted, like=job.like))
        except BadImageError as error:
            return _Image(job, error=error)
        except OSError as error:
            hint = "correct the path or its permissions, or fetch the image"
            return _Image(job, error=BadImageError(path, f"cannot be read ({error.strerror})", hint))
        return _Image(job, file, image.size, pixels)


def _absolute(path: Path) -> Path:
    return Path(absolute(path))


@torch.inference_mode()
def _encode(vae: AutoencoderKL, batch: Sequence[_Image], batch_size: int, meta: Meta) -> np.ndarray:
    """Rows [len(batch), 2, C, h, w] in the stored dtype."""
    if not batch:
        return np.empty((0, *meta.row), DTYPES[meta.dtype])
    pixels = torch.zeros(batch_size, 3, meta.height, meta.width)
    for place, image in zip(pixels[: len(batch)], batch, strict=True):
        place.copy_(image.pixels)
    try:
        moments = [encode(vae, part.to(vae.device)) for part in pixels.split(_CHUNK)]
    except torch.OutOfMemoryError as error:
        raise StoreError(f"out of memory with {batch_size} images at a time: give a smaller batch size") from error
    rows = torch.cat([torch.stack([m.mean, m.std], dim=1) for m in moments])[: len(batch)].float().cpu().numpy()
    with np.errstate(over="ignore"):  # values beyond float16 become infinite and are reported
        return rows.astype(DTYPES[meta.dtype])

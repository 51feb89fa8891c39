"""Extracting: every image of the records through the VAE once, into a store of moments (see `store`)."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL

from mige.data.crops import Crop, as_crops, training_crops
from mige.data.latent_store.encoding import CHUNK, ENOUGH_DB, Encoder, psnr
from mige.data.latent_store.entries import ENTRY, make_entry
from mige.data.latent_store.meta import DTYPES, Meta
from mige.data.latent_store.opening import Chunk, Job, open_chunks
from mige.data.latent_store.part import PartWriter
from mige.data.latent_store.store import FeatureStore
from mige.data.records import Issue, Record
from mige.utils.files import absolute
from mige.utils.progress import Progress

_WAITING = 4  # batches between the VAE and the disk: enough to bridge a slow flush


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
    compiled: bool = False,
    progress: bool = False,
) -> list[Issue]:
    """Encode this process's share of the images, those that the store lacks or that have changed.

    First all that are cropped by their own shape, then those cropped like one of them, whose shape the store knows by
    then; where that one failed, they are left out.

    Args:
        store: made by `create_store` with this VAE; open it again to see what was added. Its meta says in which
            precision the VAE encodes.
        vae: in float32; a copy is cast.
        named: image -> where it comes from (see `distinct_crops`), the same in all processes, of which this is number
            `process`; every `processes`-th image is its share.
        wait: waits for all processes; called between the two.
        batch_size: images written at a time; 8 of them go through the VAE at once, or all if there are fewer. What is
            short of 8 is filled up, so that any size from 8 on gives the same bits whatever was done before.
        workers: processes that open images; 0: none.
        compiled: the VAE's encoder through the compiler, on a GPU.
        progress: show a bar.

    Returns what could not be encoded, an issue an image. Raises StoreError if memory is short, OSError if writing
    fails; all batches before are kept.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    places = dict(zip(as_crops(named), named.values(), strict=True))
    pairs = [crop for crop in places if crop.like is not None]
    encoder, issues = Encoder(vae, store.meta.precision, compiled=compiled), []
    for number, crops in enumerate([[crop for crop in places if crop.like is None], pairs][: 2 if pairs else 1]):
        if number == 1:
            wait()
            store = FeatureStore(store.folder, store.meta, Path(store.root))
        jobs = distinct_jobs(store, crops)[process::processes]
        todo = {*store.missing(job.crop for job in jobs), *store.changed(job.crop for job in jobs)}
        issues += _encode_jobs(
            store,
            encoder,
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


def distinct_jobs(store: FeatureStore, crops: Sequence[Crop]) -> list[Job]:
    """A job for every row that the store is to have; none for what is cropped like an image that it lacks."""
    sizes = store.image_sizes(list({crop.like for crop in crops if crop.like is not None}))
    jobs = {}
    for crop in crops:
        if crop.like is None or crop.like in sizes:
            like = sizes.get(crop.like)
            key = store.key(crop.path, like)
            jobs.setdefault(key, Job(crop, key, like))
    return list(jobs.values())


def _encode_jobs(
    store: FeatureStore,
    encoder: Encoder,
    jobs: Sequence[Job],
    places: Mapping[Crop, str],
    *,
    process: int,
    batch_size: int,
    workers: int,
    bar: dict,
) -> list[Issue]:
    """Encode all into a part of the store; what could not be, as issues.

    Workers open the images, this thread gives them to the device, and a thread writes what has come back.
    """
    loader = open_chunks(jobs, store.meta, min(CHUNK, batch_size), workers, pinned=encoder.on_gpu)
    issues, written = [], deque()

    def settle(future: Future) -> None:
        failed, count = future.result()
        issues.extend(Issue(f"{places[job.crop]}: {job.crop.path}", *why) for job, *why in failed)
        shown.update(count, failed=len(failed))

    with (
        PartWriter(store.folder, process) as part,
        Progress(unit="image", **bar) as shown,
        ThreadPoolExecutor(1) as disk,
    ):
        for chunks in _batched(loader, -(-batch_size // CHUNK)):
            coming = [(chunk, encoder(chunk.levels) if chunk.images else None) for chunk in chunks]
            written.append(disk.submit(_write, part, coming, store.meta))
            if len(written) > _WAITING:
                settle(written.popleft())
        while written:
            settle(written.popleft())
    return issues


def _batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size`, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _write(
    part: PartWriter, coming: Sequence[tuple[Chunk, Callable[[], np.ndarray] | None]], meta: Meta
) -> tuple[list[tuple], int]:
    """Wait for the rows of chunks and write them; (job, message, hint) of what is not written, and the images done."""
    failed, entries, rows = [], [np.empty(0, ENTRY)], [np.empty((0, *meta.row), DTYPES[meta.dtype])]
    for chunk, arrived in coming:
        failed += [(image.job, image.error.message, image.error.hint) for image in chunk.failed]
        if arrived is None:
            continue
        with np.errstate(over="ignore"):  # values beyond float16 become infinite and are reported
            found = arrived()[: len(chunk.images)].astype(DTYPES[meta.dtype], copy=False)
        for image, row in zip(chunk.images, found, strict=True):
            if np.isfinite(row).all():
                entries.append(make_entry(image.job.key, image.file, image.size, row))
                rows.append(row[None])
            else:
                hint = "store float32 or check the VAE"
                failed.append((image.job, f"its moments are not finite in {meta.dtype}", hint))
    part.add(np.concatenate(entries), np.concatenate(rows))
    return failed, sum(len(chunk.images) + len(chunk.failed) for chunk, _ in coming)


def choose_precision(vae: AutoencoderKL, named: Iterable[Path | Crop], meta: Meta) -> tuple[str, float | None]:
    """("bfloat16" or "float32", PSNR of bfloat16 moments over the first images that can be opened, dB).

    bfloat16 where the PSNR (`encoding.psnr`) is at least ENOUGH_DB; without an image, or on a CPU, which is no
    faster in bfloat16, float32 and None. vae: in float32, on its device.
    """
    if vae.device.type == "cpu":
        return "float32", None
    jobs = [Job(crop, b"", None) for crop in as_crops(named) if crop.like is None]
    for chunk in open_chunks(jobs, meta, CHUNK, 0):
        if chunk.images:
            found = psnr(vae, chunk.levels[: len(chunk.images)], "bfloat16")
            return ("bfloat16" if found >= ENOUGH_DB else "float32"), found
    return "float32", None


def _absolute(path: Path) -> Path:
    return Path(absolute(path))

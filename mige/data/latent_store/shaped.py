"""The stores of a training on several shapes: a folder of stores, one a shape, each of the images cropped to it."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from mige.data.crops import Crop
from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.extraction import distinct_crops
from mige.data.latent_store.store import FeatureStore, NpyFolder, open_store
from mige.data.records import Issue, Record
from mige.data.shapes import nearest_shapes, read_target_sizes

Size = tuple[int, int]
"""Height and width, px."""
Store = FeatureStore | NpyFolder


def store_folders(folder: Path, sizes: Sequence[Size]) -> dict[Size, Path]:
    """Where the store of each shape is: `folder` itself if there is one shape, else a folder in it, as "448x576"."""
    if len(sizes) == 1:
        return {sizes[0]: folder}
    return {(height, width): folder / f"{height}x{width}" for height, width in sizes}


def crops_of_shapes(
    records: Sequence[Record], sizes: Sequence[Size]
) -> tuple[dict[Size, dict[Crop, str]], list[Issue]]:
    """What the store of each shape is to hold, as `distinct_crops`: images of the records that are shown in it.

    Of several shapes, a record has the nearest to its target's; the issues say of which records that is not known.
    """
    if len(sizes) == 1:
        return {sizes[0]: distinct_crops(records)}, []
    hint = "name one: what a record is cropped to follows from its target"
    issues = [Issue(r.where, 'no target, the field "image"', hint) for r in records if r.target is None]
    seen: dict[Path, tuple[int, int]] = {}
    issues += read_target_sizes(records, seen)
    known = [record for record in records if record.target in seen]
    shapes = nearest_shapes([seen[record.target] for record in known], sizes)
    return {
        size: distinct_crops(record for record, shape in zip(known, shapes, strict=True) if shape == number)
        for number, size in enumerate(sizes)
    }, issues


def open_stores(folder: Path, vae: AutoencoderKL, sizes: Sequence[Size]) -> dict[Size, Store]:
    """The stores of these shapes, ready for reading.

    Raises StoreError if there is none for a shape, or one that does not fit, as `open_store`.
    """
    folders = store_folders(folder, sizes)
    for path in folders.values():
        if path != folder and not path.is_dir():
            raise StoreError(
                f"{path}: no such folder; of {len(sizes)} shapes each has a store of its own: make them with "
                "tools/extract_features.py --config"
            )
    return {size: open_store(path, vae=vae, size=size) for size, path in folders.items()}

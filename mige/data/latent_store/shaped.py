"""The stores of a training on several shapes: a folder of stores, one a shape, each of the images cropped to it."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import AutoencoderKL

from mige.data.latent_store.errors import StoreError
from mige.data.latent_store.store import FeatureStore, NpyFolder, open_store

Size = tuple[int, int]
"""Height and width, px."""
Store = FeatureStore | NpyFolder


def store_folders(folder: Path, sizes: Sequence[Size]) -> dict[Size, Path]:
    """Where the store of each shape is: `folder` itself if there is one shape, else a folder in it, as "448x576"."""
    if len(sizes) == 1:
        return {sizes[0]: folder}
    return {(height, width): folder / f"{height}x{width}" for height, width in sizes}


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

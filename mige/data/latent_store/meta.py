"""What a store was made with: its meta.json, compared before anything is read."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from mige.data.latent_store.errors import StoreError
from mige.models.vae import downscale
from mige.utils.files import read_json_object

VERSION = 2
OUTDATED = {1: "it holds sources cropped by their own shape instead of their target's"}
FIT = "center_crop"  # training crops every image so; a source like its target (see data/crops.py)
DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Meta:
    """The content of meta.json."""

    version: int
    height: int  # pixels
    width: int
    fit: str
    vae: str  # fingerprint
    shape: tuple[int, int, int]  # of a mean: [C, h, w]
    dtype: str  # of the stored values
    root: str  # absolute; keys are paths relative to it
    precision: str = "float32"  # that the VAE encoded in

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Shape of a row: mean and std."""
        return (2, *self.shape)

    @property
    def row_bytes(self) -> int:
        """Size of a row as stored."""
        return int(np.prod(self.row)) * DTYPES[self.dtype].itemsize


def make_meta(vae: AutoencoderKL, size: int | tuple[int, int]) -> Meta:
    """The facts of a float32 store of this VAE's moments, without a root.

    `size`: side, or height and width, of the images in pixels. Raises StoreError for a size off the VAE's grid.
    """
    height, width = (size, size) if isinstance(size, int) else size
    cell = downscale(vae)
    if min(height, width) < cell or height % cell or width % cell:
        raise StoreError(f"images of {height} x {width} pixels, expected multiples of {cell}; give another size")
    shape = (vae.config.latent_channels, height // cell, width // cell)
    return Meta(VERSION, height, width, FIT, fingerprint(vae), shape, "float32", "")


def read_meta(folder: Path) -> Meta:
    """The facts of the store in a folder. Raises StoreError for another version and for a file that is not whole."""
    path = folder / "meta.json"
    try:
        values = read_json_object(path)
        if values["version"] != VERSION:
            why = f" ({OUTDATED[values['version']]})" if values["version"] in OUTDATED else ""
            raise StoreError(
                f"{path}: version {values['version']}, expected {VERSION}{why}; "
                "run tools/extract_features.py on the same records again, with another --output"
            )
        meta = Meta(**values | {"shape": tuple(values["shape"])})
        sides = (meta.height, meta.width, *meta.shape)
        if [type(side) for side in sides] != [int] * 5 or min(sides) < 1:
            raise ValueError(f"height {meta.height!r}, width {meta.width!r}, shape {meta.shape!r}")
        if meta.dtype not in DTYPES or not isinstance(meta.root, str):
            raise ValueError(f"dtype {meta.dtype!r}, root {meta.root!r}")
        if meta.precision not in tuple(PRECISIONS):
            raise ValueError(f"precision {meta.precision!r}")
    except StoreError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise StoreError(f"{path}: damaged ({error!r}); restore it or extract again into another folder") from error
    return meta


def require_equal(folder: Path, found: Meta, expected: Meta) -> None:
    """Raise StoreError naming every difference; the root may differ."""
    theirs, ours = asdict(replace(found, root="")), asdict(replace(expected, root=""))
    differing = [f"{name} {theirs[name]} there, {ours[name]} expected" for name in ours if theirs[name] != ours[name]]
    if differing:
        raise StoreError(
            f"{folder}: made with other settings: {'; '.join(differing)}; "
            "use the size and the VAE of the store, or extract again into another folder"
        )


def fingerprint(vae: AutoencoderKL) -> str:
    """sha256 of what makes moments: the encoder's weights as float32, and the config fields that shape it.

    The decoder has no part in it: VAEs that differ in the decoder alone give the same moments.
    """
    sha = hashlib.sha256()
    fields = ("act_fn", "block_out_channels", "down_block_types", "layers_per_block", "mid_block_add_attention")
    fields += ("norm_num_groups", "in_channels", "latent_channels", "use_quant_conv")
    sha.update(json.dumps({name: vae.config[name] for name in fields}).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            sha.update(f"{name} {list(tensor.shape)}".encode())
            sha.update(tensor.detach().float().cpu().contiguous().numpy())
    return sha.hexdigest()

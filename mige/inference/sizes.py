"""The sizes of images that a model makes: the one place that knows its grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, PixArtTransformer2DModel

from mige.models.vae import downscale_of
from mige.tasks import Task
from mige.utils.images import MAX_PIXELS


@dataclass(frozen=True)
class SizeGrid:
    """Sides are multiples of `step`, the VAE's factor times the DiT's patch size, px."""

    channels: int  # of a latent (4)
    cell: int  # px of a latent cell along one side (8)
    patch: int  # latent cells of a patch along one side (2)
    native: int  # px, side of the images the DiT was trained on, and of all references (512)

    @classmethod
    def of(cls, vae_config: Mapping[str, Any], transformer_config: Mapping[str, Any]) -> "SizeGrid":
        """That of a model with these configs."""
        cell = downscale_of(vae_config)
        native = transformer_config["sample_size"] * cell
        return cls(vae_config["latent_channels"], cell, transformer_config["patch_size"], native)

    @classmethod
    def of_folder(cls, model: Path) -> "SizeGrid":
        """That of a checkpoint folder; reads the configs of VAE and DiT only."""
        transformer_config = PixArtTransformer2DModel.load_config(model / "transformer")
        return cls.of(AutoencoderKL.load_config(model / "vae"), transformer_config)

    @property
    def step(self) -> int:
        """What both sides are a multiple of, px (16)."""
        return self.cell * self.patch

    def resolve(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width, px, with the native side for None.

        Raises ValueError for a size off the grid, or of more pixels than any image may have.
        """
        sides = self.native if height is None else height, self.native if width is None else width
        if any(side < self.step or side % self.step for side in sides):
            raise ValueError(f"height and width must be multiples of {self.step} px, got {sides[0]} x {sides[1]}")
        if sides[0] * sides[1] > MAX_PIXELS:
            raise ValueError(f"height x width is {sides[0]} x {sides[1]}, expected at most {MAX_PIXELS:,} pixels")
        return sides

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape [channels, h, w] of the latent of an image of this size, px; raises ValueError as `resolve`."""
        height, width = self.resolve(height, width)
        return self.channels, height // self.cell, width // self.cell

    def reference_shape(self, task: Task, height: int, width: int) -> tuple[int, int, int]:
        """Shape of a reference's latent: an edit's is the output's, other references have the native size."""
        return self.latent_shape(height, width) if task is Task.EDIT else self.latent_shape(self.native, self.native)

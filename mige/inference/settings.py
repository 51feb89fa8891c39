"""What decides the images of a run, and whether two runs agree on it."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mige.inference.shapes import SizeWish


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run's images look like. None: the official value of the record's task."""

    model: str  # checkpoint folder or hub name
    dtype: str  # of the weights: float32, bfloat16
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    source_guidance: float | None = None
    height: int | None = None  # pixels; None: as `size` says
    width: int | None = None
    size: str = "native"  # of the images: see `SizeWish`; version 0.1 knew the native one alone
    long_side: int | None = None  # pixels
    paste_back: bool = False  # edits at their sources' own resolution
    lora: str | None = None  # folder of adapters added to the model, with a scale of 1
    loras: list[list] | None = None  # several of them, or one of another scale: [folder, scale] each
    vae_dtype: str = "float32"  # or bfloat16
    t5_bits: int | None = None  # 8 or 4: the text encoder's matrices rounded to so many bits
    reuse: int = 1  # the DiT's middle blocks are computed every so many steps (above 1 an approximation)
    ignore_profiles: bool = False  # take the references' numbers as sRGB whatever their profile, as released
    noise: str = "record"  # "record": a generator a record; "official": drawn a chunk at a time, as released

    def __post_init__(self):
        if self.noise not in ("record", "official"):
            raise ValueError(f"noise must be 'record' or 'official', got {self.noise!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.vae_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"vae_dtype must be 'float32' or 'bfloat16', got {self.vae_dtype!r}")
        if self.noise == "official" and self.wish.follows_source:
            raise ValueError("the official noise is drawn for a whole chunk of one size: give --size native")
        if self.loras is not None:
            object.__setattr__(self, "loras", [[os.path.normpath(path), float(scale)] for path, scale in self.loras])
        for name in FOLDERS:  # one folder, one spelling: "x/" and "./x" are "x"
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.normpath(folder))

    @property
    def adapters(self) -> list[tuple[str, float]]:
        """Folders of adapters, each with its scale."""
        return [(self.lora, 1.0)] if self.lora else [(path, scale) for path, scale in self.loras or []]

    @property
    def wish(self) -> SizeWish:
        """The size of the images; raises ValueError for one that contradicts itself."""
        return SizeWish(self.size, self.height, self.width, self.long_side)

    def resolved(self) -> dict[str, str | None]:
        """Where the folders of these settings lie, links followed; None for what is no folder here (a hub name)."""
        found = {name: getattr(self, name) for name in FOLDERS}
        return {name: os.path.realpath(at) if at and Path(at).exists() else None for name, at in found.items()}

    def changed(self) -> dict[str, Any]:
        """The settings that have no default or another value than it."""
        return {name: value for name, value in asdict(self).items() if value != DEFAULTS.get(name, MISSING)}


FOLDERS = ("model", "lora")
DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}


def differing(there: Mapping[str, Any], settings: Settings, resolved: Any = None) -> list[str]:
    """A phrase for each setting that has another value in an earlier run's settings.

    Args:
        there: settings by name, as JSON; what a run left out has its default.
        resolved: where the folders of `there` lay (`Settings.resolved`), as far as that is known.
    """
    theirs, resolved = DEFAULTS | dict(there), resolved if isinstance(resolved, dict) else {}

    def is_same(name: str, value: Any) -> bool:
        known, at = theirs.get(name), resolved.get(name)
        if name in FOLDERS and isinstance(known, str) and isinstance(value, str):
            return is_same_file(known, at if isinstance(at, str) else None, value)
        return known == value

    return [
        f"{name}: {theirs.get(name)} there, {value} now"
        for name, value in asdict(settings).items()
        if not is_same(name, value)
    ]


def is_same_file(known: str, resolved: str | None, path: str | Path) -> bool:
    """Whether a path is the file or folder that an earlier run knew by another spelling, or through links.

    Args:
        known: the path as the earlier run spelt it. resolved: where it led then, from the root and without links, if
            that is known. Where nothing is there any more (the data was moved), the spelling decides.
    """
    before = Path(resolved or known)
    try:
        if before.exists() and Path(path).exists():
            return before.samefile(path)
    except (OSError, ValueError):  # no path at all: a NUL character, a name that is too long
        return known == str(path)
    return known == str(path) or os.path.abspath(before) == os.path.abspath(path)  # noqa: PTH100 - no link followed

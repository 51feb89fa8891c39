"""Official weight files, read without running code in them and compared key by key."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mige.checkpoints.errors import CheckpointError


def read_weights(path: Path, *wrappers: str) -> dict[str, Tensor]:
    """The tensors of a .pth / .bin / .safetensors file, memory-mapped, below the given keys of its top dict.

    Any shape and dtype, on the CPU.

    Raises CheckpointError for a missing or damaged file, a pickle that carries code, and anything that is no dict of
    tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's message goes on to advise switching the protection off
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise CheckpointError(f"{path}: refused, it holds more than tensors or is damaged: {reason}") from error
    except Exception as error:  # damaged bytes make the unpickler raise anything, from KeyError to UnicodeDecodeError
        raise CheckpointError(f"{path}: cannot be read as a PyTorch file (damaged or truncated?): {error}") from error
    for key in wrappers:
        if not isinstance(data, dict) or key not in data:
            raise CheckpointError(f"{path}: expected a dict with the key {key!r}, got {_describe(data)}")
        data = data[key]
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {_describe(data)}")
    return dict(data)


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], origin: str, extra: str = r"(?!)"
) -> list[str]:
    """Compare a file with what it should hold, by key and shape.

    Args:
        state: the file's tensors by key. expected: shapes by key.
        origin: the file, for the message.
        extra: a pattern of whole keys that may be there besides; those found are returned, sorted.

    Raises CheckpointError naming every missing and unexpected key, and every one of another shape.
    """
    left_over = sorted(state.keys() - expected.keys())
    known = [key for key in left_over if re.fullmatch(extra, key)]
    errors = [f"missing: {key} {list(shape)}" for key, shape in expected.items() if key not in state]
    errors += [f"unexpected: {key} {list(state[key].shape)}" for key in left_over if key not in known]
    errors += [
        f"shape mismatch: {key} is {list(state[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != tuple(shape)
    ]
    if errors:
        lines = "\n  ".join(errors)
        raise CheckpointError(
            f"{origin}: {len(errors)} of its keys do not fit the config; is it the right file?\n  {lines}"
        )
    return known


def _describe(data: object) -> str:
    return f"a dict with the keys {list(data)[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"

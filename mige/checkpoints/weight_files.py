"""The weight files of one part of a checkpoint: the very ones that will be read, and what their headers say.

diffusers and transformers read `STEM.safetensors`, or the files that `STEM.safetensors.index.json` names; of a variant
`STEM.fp16.safetensors` or `STEM.safetensors.index.fp16.json`. Whatever else lies there would be left out in silence.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mige.checkpoints.errors import CheckpointError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf")
FLOATS = {"F64", "F32", "F16", "BF16"}
"""What weights are stored in, as safetensors names it."""


@dataclass(frozen=True)
class Stored:
    """What the header of a file says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name: F32, BF16, I8, ...


def read_json(path: Path, *keys: str) -> dict:
    """The object in a JSON file, or the one below the given keys; raises CheckpointError for anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected an object" + "".join(f" with the key {key!r}" for key in keys))
    return data


def has_variant(folder: Path, stem: str, variant: str) -> bool:
    """Whether the part has weights of that variant."""
    return (folder / f"{stem}.{variant}.safetensors").is_file() or _index(folder, stem, variant).is_file()


def files_to_read(folder: Path, stem: str, variant: str | None) -> tuple[list[Path], list[str]]:
    """The files that will be read, and what is wrong with the files of the folder."""
    own, errors = _set(folder, stem, variant)
    known = set(own)
    for path in folder.iterdir():  # complete sets of other variants may lie beside
        name = path.name
        if name.startswith(f"{stem}.safetensors.index.") and name.endswith(".json"):
            other = name.removeprefix(f"{stem}.safetensors.index.").removesuffix(".json").removesuffix("json")
            known |= {folder / str(file) for file in read_json(path, "weight_map").values()} if other else set()
        elif name.startswith(f"{stem}.") and name.endswith(".safetensors") and name.count(".") == 2:
            known.add(path)
    if variant is not None:
        known |= set(_set(folder, stem, None)[0])
    stray = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path not in known)
    errors += [f"{name} is in no index and would not be read: remove it" for name in stray]
    return [path for path in own if path.is_file()], errors


def header(file: Path) -> dict[str, Stored]:
    """Shapes and dtypes of a file's tensors; raises CheckpointError for a damaged one."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
            return {key: Stored(tuple(piece.get_shape()), piece.get_dtype()) for key, piece in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file.name}: {error}") from error


def _set(folder: Path, stem: str, variant: str | None) -> tuple[list[Path], list[str]]:
    """One variant's files, and what is wrong with the set."""
    whole = folder / (f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors")
    index = _index(folder, stem, variant)
    if whole.is_file() and index.is_file():
        return [whole], [f"{whole.name} and {index.name}: two sets of the same weights; remove one of them"]
    if index.is_file():
        names = sorted(set(map(str, read_json(index, "weight_map").values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            return [], [f"{index.name} names {outside[0]!r}, expected files beside it"]
        paths = [folder / name for name in names]
        missing = [f"missing file {path.name}" for path in paths if not path.is_file()]
        return paths, missing or _index_mismatches(index, paths)
    if whole.is_file():
        return [whole], []
    return [], [f"expected config.json and *.safetensors files: neither {whole.name} nor {index.name} is there"]


def _index_mismatches(index: Path, files: list[Path]) -> list[str]:
    """Where an index and its files disagree on which file holds a tensor: readers differ in whom they believe."""
    read_json(index, "metadata")  # both libraries end with a KeyError without
    where = {key: str(name) for key, name in read_json(index, "weight_map").items()}
    held: dict[str, list[str]] = {}
    for file in files:
        for key in header(file):
            held.setdefault(key, []).append(file.name)
    errors = [f"{key} is in {' and in '.join(names)}" for key, names in held.items() if len(names) > 1]
    return (
        errors
        + [
            f"{key} is in {names[0]}, {index.name} says {where.get(key, 'nothing of it')}"
            for key, names in held.items()
            if len(names) == 1 and where.get(key) != names[0]
        ]
        + [f"{key} is not in {name}, as {index.name} says" for key, name in where.items() if key not in held]
    )


def _index(folder: Path, stem: str, variant: str | None) -> Path:
    return folder / (
        f"{stem}.safetensors.index.json" if variant is None else f"{stem}.safetensors.index.{variant}.json"
    )


def mismatches(found: dict[str, Stored], expected: dict[str, Any], aliases: set[str]) -> list[str]:
    """What differs between the stored tensors and those of the part as its config describes it (on the meta device)."""
    errors = [f"missing {key}" for key in expected.keys() - found.keys()]
    errors += [f"unexpected {key}" for key in found.keys() - expected.keys() - aliases]
    for key in expected.keys() & found.keys():
        if found[key].shape != tuple(expected[key].shape):
            errors.append(f"{key} is {list(found[key].shape)}, its config says {list(expected[key].shape)}")
        if expected[key].is_floating_point() and found[key].dtype not in FLOATS:
            errors.append(f"{key} is stored as {found[key].dtype}, expected one of {', '.join(sorted(FLOATS))}")
    return errors

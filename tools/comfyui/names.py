"""The models and adapters on offer, by name: what lies in ComfyUI's folders for "mige". No workflow names a path."""

from pathlib import Path

import folder_paths

KIND = "mige"  # of ComfyUI's folders: `mige:` in extra_model_paths.yaml adds more
CHECKOUT = Path(__file__).resolve().parents[2] / "output" / "pretrained_models"  # of the checkout that is linked to


def register() -> None:
    """Add ComfyUI's own models/mige, and the models of the checkout, to the folders of this kind."""
    for folder in (Path(folder_paths.models_dir, KIND), CHECKOUT):
        folder_paths.add_model_folder_path(KIND, str(folder))


def models() -> dict[str, Path]:
    """Checkpoint folders by name; of two of one name the first counts, as everywhere in ComfyUI."""
    return {path.name: path for path in _entries() if (path / "model_index.json").is_file()}


def adapters() -> dict[str, Path]:
    """Folders and files of adapters by name."""
    from mige.checkpoints.lora_files import DIFFUSERS_FILE, PARTS, PEFT_FILE

    known = (DIFFUSERS_FILE, PEFT_FILE, *(f"{part}/{PEFT_FILE}" for part in PARTS))
    return {
        path.name: path
        for path in _entries()
        if (path.is_file() and path.suffix == ".safetensors") or any((path / name).is_file() for name in known)
    }


def find(what: str, name: str, offered: dict[str, Path]) -> Path:
    """The path of what a workflow names; raises ValueError for a name that is not on offer."""
    if name not in offered:
        there = ", ".join(sorted(offered)) or "none"
        raise ValueError(f"there is no {what} {name!r}; there are: {there}. Put it into ComfyUI's models/{KIND}")
    return offered[name]


def _entries() -> list[Path]:
    """What lies in the folders, the first folder last, so that its names win in a dict."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(KIND)]
    return [path for folder in reversed(folders) if folder.is_dir() for path in sorted(folder.iterdir())]

"""Where a checkout, or an installed package without one, keeps what the commands read by default."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a wheel; in a checkout a link to its own folder
_IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()


def _named(path: str) -> Path:
    """A path of the checkout as a user would name it: relative where the checkout is the working directory.

    Without a checkout the working directory takes its place.
    """
    return Path(path) if Path.cwd() == ROOT or not _IS_CHECKOUT else ROOT / path


CONFIGS = _named("configs") if _IS_CHECKOUT else _CONFIGS
MODELS = _named("output/pretrained_models")
MINI = MODELS / "mige-mini"
MINI_STUDENT = MODELS / "mige-mini-turbo"
NO_MODEL = (
    "there is no model: name its folder with --model or MIGE_MODEL, or fetch the released one with `mige download`"
)


def config(name: Path) -> Path:
    """A config file: as it is named, else the package's own of that name ("configs/tiny.py", "tiny.py")."""
    own = CONFIGS / (name.relative_to("configs") if name.parts[:1] == ("configs",) else name)
    return own if own.is_file() and not name.exists() else name


def model(given: str | None, *usual: Path) -> str | None:
    """The model to run: as given, else MIGE_MODEL, else the first there is of `usual` and `mige download`'s.

    None where there is none: `NO_MODEL` says so.
    """
    named = given or os.environ.get("MIGE_MODEL")
    return named or next((str(folder) for folder in (*usual, MODELS / "mige") if folder.is_dir()), None)

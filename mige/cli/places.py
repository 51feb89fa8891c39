"""Where a checkout keeps what the scripts read by default."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _named(path: str) -> Path:
    """A path of the checkout as a user would name it: relative where the checkout is the working directory."""
    return Path(path) if Path.cwd() == ROOT else ROOT / path


CONFIGS = _named("configs")
MODELS = _named("output/pretrained_models")
MINI = MODELS / "mige-mini"
MINI_STUDENT = MODELS / "mige-mini-turbo"

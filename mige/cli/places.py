"""Where a checkout keeps what the scripts read by default."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
MODELS = Path("output/pretrained_models")  # below the working directory, as users name them
MINI = MODELS / "mige-mini"

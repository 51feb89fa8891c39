"""Named by `model_index.json` of folders saved by version 0.1.0; the class lives in `mige.models.fusion`."""

from mige.models.fusion import MIGEFusion

__all__ = ["MIGEFusion"]

"""Named by `model_index.json` of folders saved by version 0.1.0; the class lives in `mige.models.fusion`.

diffusers looks up in the named module how the class is loaded: by its base class.
"""

from diffusers import ModelMixin

from mige.models.fusion import MIGEFusion

__all__ = ["MIGEFusion", "ModelMixin"]

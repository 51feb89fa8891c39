"""Named by `model_index.json` of folders saved by version 0.1.0; the class lives in `mige.diffusion.solver`.

diffusers looks up in the named module how the class is loaded: by its base class.
"""

from diffusers import SchedulerMixin

from mige.diffusion.solver import DPMSolver2M

__all__ = ["DPMSolver2M", "SchedulerMixin"]

"""Named by `model_index.json` of folders saved by version 0.1.0; the class lives in `mige.diffusion.solver`."""

from mige.diffusion.solver import DPMSolver2M

__all__ = ["DPMSolver2M"]

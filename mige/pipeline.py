"""The pipeline's place in version 0.1.0; use `from mige import MIGEPipeline`."""

import warnings

from mige.inference.pipeline import MIGEPipeline

__all__ = ["MIGEPipeline"]
warnings.warn("mige.pipeline has moved: from mige import MIGEPipeline", FutureWarning, stacklevel=2)

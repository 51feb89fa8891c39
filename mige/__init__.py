"""MIGE: one diffusion model for subject-driven generation, instruction-based editing, and both at once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mige.inference.pipeline import MIGEPipeline

__all__ = ["MIGEPipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`from mige import MIGEPipeline` imports torch and the libraries; `import mige` does not."""
    if name == "MIGEPipeline":
        from mige.inference.pipeline import MIGEPipeline

        return MIGEPipeline
    raise AttributeError(f"module 'mige' has no attribute {name!r}")

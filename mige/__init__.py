"""MIGE: one diffusion model for subject-driven generation, instruction-based editing, and both at once."""

__version__ = "0.1.0"

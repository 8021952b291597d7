"""moefx: a compiler for sparsifying diffusion models."""

__version__ = "0.1.0"

"""moefx: a compiler for sparsifying diffusion models.

Trace a dense denoiser, find its feed-forward networks and attentions by data flow, rewrite them into routed experts, prove
what each rewrite promised, plan where experts live, and emit fused kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moefx.api import misses, plan, sites, transform, untransform
    from moefx.errors import MoefxError
    from moefx.graph import Graph, trace
    from moefx.training import aux_loss, health

_PUBLIC = {
    "Graph": "moefx.graph",
    "MoefxError": "moefx.errors",
    "aux_loss": "moefx.training",
    "health": "moefx.training",
    "misses": "moefx.api",
    "plan": "moefx.api",
    "sites": "moefx.api",
    "trace": "moefx.graph",
    "transform": "moefx.api",
    "untransform": "moefx.api",
}

__all__ = [*_PUBLIC, "__version__"]  # noqa: PLE0604 - names are strings


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used, so that ``import moefx`` stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moefx' has no attribute {name!r}")
    found = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found

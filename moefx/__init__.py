"""moefx: a compiler for sparsifying diffusion models.

Trace a dense denoiser, find its feed-forward networks and attentions by data flow, rewrite them into routed experts,
prove what each rewrite promised, plan where experts live, and emit fused kernels.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moefx.api import misses, plan, sites, transform, untransform
    from moefx.bisection import bisect
    from moefx.errors import MoefxError
    from moefx.graph import Graph, trace
    from moefx.inspect.dump import dump
    from moefx.model.load import load
    from moefx.model.save import save
    from moefx.model.specialise import specialise
    from moefx.offloading.offload import offload, onload
    from moefx.parallel.parallelize import parallelize
    from moefx.passes.calibration import Calibration, calibrate
    from moefx.training.aux_loss import aux_loss
    from moefx.training.health import health

_PUBLIC = {
    "Calibration": "moefx.passes.calibration",
    "Graph": "moefx.graph",
    "MoefxError": "moefx.errors",
    "aux_loss": "moefx.training",
    "bisect": "moefx.bisection",
    "calibrate": "moefx.passes.calibration",
    "dump": "moefx.inspect.dump",
    "health": "moefx.training",
    "load": "moefx.model.load",
    "misses": "moefx.api",
    "offload": "moefx.offloading",
    "onload": "moefx.offloading",
    "parallelize": "moefx.parallel",
    "plan": "moefx.api",
    "save": "moefx.model.save",
    "sites": "moefx.api",
    "specialise": "moefx.model.specialise",
    "trace": "moefx.graph",
    "transform": "moefx.api",
    "untransform": "moefx.api",
}

__all__ = [
    "Calibration",
    "Graph",
    "MoefxError",
    "__version__",
    "aux_loss",
    "bisect",
    "calibrate",
    "dump",
    "health",
    "load",
    "misses",
    "offload",
    "onload",
    "parallelize",
    "plan",
    "save",
    "sites",
    "specialise",
    "trace",
    "transform",
    "untransform",
]


def __getattr__(name: str) -> Any:
    """Load the public names when they are first used, so that ``import moefx`` stays quick."""
    if name not in _PUBLIC:
        if name.startswith("Moefx") or (name == "ModelMixin" and "diffusers" in sys.modules):
            # Diffusers looks here for the class of a saved component, and for the base that says how to load it.
            return importlib.import_module("moefx.model.diffusers").lookup(name)
        raise AttributeError(f"module 'moefx' has no attribute {name!r}")
    found = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = found
    return found

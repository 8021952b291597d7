"""Code generation: routed regions of a graph become emitted kernels.

``lower`` finds regions and makes :class:`RegionSpec`\\ s, ``schedule`` tiles them, ``emit`` prints Triton modules,
``runtime`` loads and runs them, ``aot`` compiles them without a device and reads their resources.
"""

from moefx.codegen.emit import emit, emit_tile_map
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.lower import Lowering, Refusal, describe, lowerings, replace
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule, choose
from moefx.codegen.spec import CombineSpec, KernelSpec, LinearSpec, RegionSpec
from moefx.codegen.targets import TARGETS, Target, target, target_of
from moefx.codegen.token_lowering import TokenLowering

__all__ = [
    "TARGETS",
    "CannotLower",
    "CombineSpec",
    "KernelSpec",
    "LinearSpec",
    "Lowering",
    "Pointwise",
    "Refusal",
    "RegionSpec",
    "Schedule",
    "Target",
    "TokenLowering",
    "choose",
    "describe",
    "emit",
    "emit_tile_map",
    "lowerings",
    "replace",
    "target",
    "target_of",
    "trace_pointwise",
]

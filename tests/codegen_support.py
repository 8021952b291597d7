"""The kernels that tests of schedules, compilation and golden files speak of."""

from __future__ import annotations

import importlib.util

import pytest
import torch.nn.functional as F
from torch import Tensor

from moefx.codegen import LinearSpec, Schedule, Target, trace_pointwise
from moefx.codegen.schedule import ranked

DEVICES = ("sm_80", "sm_90", "sm_100", "gfx942")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def swiglu(z: Tensor) -> Tensor:
    return F.silu(z[..., : z.shape[-1] // 2]) * z[..., z.shape[-1] // 2 :]


def up_projection() -> LinearSpec:
    return LinearSpec(1152, 4608, "bfloat16", True, True, 2, trace_pointwise(gelu_tanh, 4608))


def down_projection() -> LinearSpec:
    return LinearSpec(4608, 1152, "bfloat16", True)


def gated_projection() -> LinearSpec:
    return LinearSpec(1152, 4608, "bfloat16", False, True, 2, trace_pointwise(swiglu, 9216))


def two_weights() -> LinearSpec:
    pair = trace_pointwise(lambda up, gate: F.silu(gate) * up, 4608, inputs=2)
    return LinearSpec(1152, 4608, "bfloat16", True, True, 2, pair, weights=2)


STANDARD = {
    "up": up_projection,
    "down": down_projection,
    "gated": gated_projection,
    "two weights": two_weights,
}


def best(spec: LinearSpec, target: Target, load: int, *, variant: str, divided: bool | None = None) -> Schedule:
    """Return the cheapest schedule of one variant."""
    return next(
        s
        for s in ranked(spec, target, load, 8)
        if s.variant == variant and (divided is None or s.warp_specialize == divided)
    )

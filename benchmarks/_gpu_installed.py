"""Peers for ``gpu.py`` that take part where they are installed: liger-kernel and scattermoe, by their own functions.

Neither is a dependency. ``pip install --no-deps liger-kernel`` is enough: they need torch and Triton alone.
"""

from __future__ import annotations

import importlib.util

import torch
from _gpu_cases import Build, Case, NotHere, Run
from torch import Tensor


def installed() -> dict[str, Build]:
    """Return the peers that can be imported here."""
    found: dict[str, Build] = {"liger_kernel": liger, "scattermoe": scattermoe}
    return {name: build for name, build in found.items() if importlib.util.find_spec(name) is not None}


def liger(case: Case) -> Run:
    """Return liger-kernel's fused experts, which are SwiGLU.

    Raises :class:`NotHere` for other activations.
    """
    if not case.shape.gated:
        raise NotHere
    from liger_kernel.ops import LigerFusedMoEFunction

    chosen = case.experts.to(torch.int32)
    return lambda: LigerFusedMoEFunction.apply(case.x, case.w1, case.w2, chosen, case.gates)


def scattermoe(case: Case) -> Run:
    """Return scattermoe's two scattered products; sorting is inside, as in its own module."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def run() -> Tensor:
        routing = flatten_sort_count(case.experts, num_experts=case.shape.experts)
        hidden = parallel_linear(case.x, case.w1.mT, case.shape.slots, *routing, grouped_out=True)
        gates = case.gates.to(case.x.dtype)
        return parallel_linear(case.activate(hidden), case.w2.mT, 1, *routing, gates=gates, grouped_in=True)

    return run

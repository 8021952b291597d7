"""From an FFN site to its dense weights and activation, and what its parameters and compute amount to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moefx.graph import Graph
from moefx.passes.analysis.pointwise import Activation
from moefx.passes.analysis.site import Site, Weight
from moefx.routing.weights import FFNWeights

_NAMES = ("w_in", "w_gate", "w_out", "b_in", "b_gate", "b_out")


def dense_weights(site: Site, graph: Graph) -> FFNWeights:
    """Return the weights of an FFN site as ``[out, in]`` matrices (views of the model's own where possible)."""
    found = {name: _tensor(site, name, graph) for name in _NAMES}
    return FFNWeights(**found)  # type: ignore[arg-type]


def _tensor(site: Site, name: str, graph: Graph) -> torch.Tensor | None:
    operand = site.operands.get(name)
    return operand.tensor(graph).detach() if isinstance(operand, Weight) else None


def unshare(module: nn.Module, dense: nn.Module) -> nn.Module:
    """Copy the parameters of ``module`` that still lie in those of ``dense``: training must not reach the latter."""
    taken = {p.untyped_storage().data_ptr() for p in dense.parameters() if not p.is_meta}
    for parameter in module.parameters():
        if not parameter.is_meta and parameter.untyped_storage().data_ptr() in taken:
            parameter.data = parameter.data.clone()
    return module


class GatedActivation(nn.Module):
    """What a gated FFN does between its projections: ``act(gate) * up``, or the general ``act(gate, up)``."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.act = act

    def forward(self, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return the hidden layer."""
        return self.act(gate) * up if self.act.arity == 1 else self.act(gate, up)

    def extra_repr(self) -> str:
        """Describe the function in ``print(model)``."""
        return str(self.act)


def hidden_function(site: Site) -> Any:
    """Return what a routed FFN calls between its projections: ``act(up)``, or ``act(up, gate)``."""
    act = site.operands["act"]
    return GatedActivation(act) if "w_gate" in site.operands else act


def ffn_sizes(site: Site) -> tuple[int, int, int, int]:
    """Return ``(D, F, D_out, number of input projections)``."""
    shapes = site.shapes
    return int(shapes["D"]), int(shapes["F"]), int(shapes["D_out"]), 2 if "w_gate" in site.operands else 1


def ffn_counts(site: Site) -> tuple[int, int]:
    """Return the parameters and the multiply-adds per token of the dense FFN."""
    dim, hidden, out, inputs = ffn_sizes(site)
    matrices = hidden * (inputs * dim + out)
    biases = sum(hidden for name in ("b_in", "b_gate") if name in site.operands) + ("b_out" in site.operands) * out
    return matrices + biases, matrices

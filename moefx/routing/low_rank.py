"""Low-rank experts: one dense FFN whose linear maps have routed low-rank deltas. Exact as long as the deltas are zero.

Legend: T tokens, K experts per token, E experts, D width, F hidden width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx import ops
from moefx.errors import OptionError
from moefx.routing.experts import DenseFFN
from moefx.routing.static import FusedFFN, FusedWeights, Pairs, chosen_pairs
from moefx.routing.weights import FFNWeights

TARGETS = ("in", "gate", "out")


class LowRankExperts(nn.Module):
    """``W x + s Σ_j g_j B_e A_e x`` in place of each targeted map ``W x`` of an FFN, e = experts[t, j], s = alpha / r.

    The same experts and gates serve all maps of the FFN. Stands where `Experts` stands, the dense FFN included, so the
    gates weigh the deltas alone. B starts at zero: exact for every router, mode and selector. At that start the router
    has no gradient yet, since nothing depends on the gates.

    Args:
        weights: of the dense FFN.
        act: its pointwise function.
        num_experts: E.
        rank: r.
        alpha: s·r.
        targets: maps with deltas: ``in``, ``gate``, ``out``.
        ungated: experts below this index have gate 1 (the core experts of TimeStep Master, arXiv 2503.07416).
        generator: source of A, N(0, 1/fan_in).
    """

    def __init__(
        self,
        weights: FFNWeights,
        act: Callable[..., Any],
        *,
        num_experts: int,
        rank: int,
        alpha: float,
        targets: Sequence[str] = ("out",),
        ungated: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not targets or not set(targets) <= set(TARGETS) or ("gate" in targets and weights.w_gate is None):
            raise OptionError(
                f"low-rank experts on {tuple(targets)}",
                found="a plain FFN" if weights.w_gate is None else "an unknown map, or none",
                do="choose among 'in', 'out', and for gated FFNs 'gate'",
            )
        self.dense, self.num_experts = DenseFFN(weights, act), num_experts
        self.rank, self.scaling, self.ungated = rank, alpha / rank, ungated
        for name in TARGETS:
            dense = {"in": weights.w_in, "gate": weights.w_gate, "out": weights.w_out}[name]
            down, up = (None, None) if name not in targets or dense is None else self._pair(dense, generator)
            self.register_parameter(f"a_{name}", down)
            self.register_parameter(f"b_{name}", up)

    def _pair(self, dense: Tensor, generator: torch.Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
        out, inputs = dense.shape
        draw = torch.randn(self.num_experts, self.rank, inputs, generator=generator) * inputs**-0.5
        return nn.Parameter(draw.to(dense)), nn.Parameter(dense.new_zeros(self.num_experts, out, self.rank))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``[T, D_o]``; arguments as for `Experts.forward`. Without experts a token gets the dense FFN."""
        gates_TK = torch.where(experts_TK < self.ungated, 1.0, gates_TK) * self.scaling
        order, offsets = ops.group(experts_TK, self.num_experts)
        slots = experts_TK.shape[1]

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
            y = F.linear(x, weight, bias)
            down, up = getattr(self, f"a_{name}"), getattr(self, f"b_{name}")
            if down is None:
                return y
            rows = ops.grouped_linear(x, down, None, order, offsets, slots)
            rows = ops.grouped_linear(rows, up, None, None, offsets)
            return y + ops.combine(rows, order, gates_TK).to(y.dtype)

        d = self.dense
        up = linear(x_TD, d.w_in, d.b_in, "in")
        hidden = d.act(up) if d.w_gate is None else d.act(up, linear(x_TD, d.w_gate, d.b_gate, "gate"))
        return linear(hidden, d.w_out, d.b_out, "out")

    def fold(self, chosen: Tensor, gates: Tensor, shared: dict[Hashable, Any]) -> tuple[Pairs, FusedFFN]:
        """Return the choice, and the FFN with the deltas of experts ``[K]`` merged: W + s Σ_j g_j B_e A_e for each map.

        The maps that have deltas are copied once per distinct choice, gates included; the others are shared.
        """
        pairs = chosen_pairs(chosen, torch.where(chosen < self.ungated, 1.0, gates), self.num_experts)
        if pairs not in shared:
            dense = self.dense.weights()
            maps = {
                f"w_{name}": self._merged(name, pairs) for name in TARGETS if getattr(self, f"a_{name}") is not None
            }
            shared[pairs] = FusedWeights(replace(dense, **maps))
        return pairs, FusedFFN(shared[pairs], None, self.dense.act)

    def _merged(self, name: str, pairs: Pairs) -> Tensor:
        """Return a map with the deltas of these experts, summed in at least float32."""
        down, up = getattr(self, f"a_{name}"), getattr(self, f"b_{name}")
        dense: Tensor = getattr(self.dense, f"w_{name}")
        wide = torch.promote_types(dense.dtype, torch.float32)
        deltas = [up[e].to(wide) @ down[e].to(wide) * (g * self.scaling) for e, g in pairs]
        total: Tensor = sum(deltas, start=dense.to(wide))
        return total.to(dense.dtype)

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"num_experts={self.num_experts}, rank={self.rank}, scaling={self.scaling}"

"""Linear-mask experts: a routed multiplicative mask of the residual stream around a block (Switch-DiT, 2403.09176).

Legend: T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.routing.moe import RoutedFFN
from moefx.routing.static import chosen_pairs


class LinearExperts(nn.Module):
    """E linear maps ``W_e x + b_e`` of one shape, zero at the start; stands where `Experts` stands."""

    def __init__(self, dim: int, num_experts: int, *, like: Tensor) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(like.new_zeros(num_experts, dim, dim))
        self.bias = nn.Parameter(like.new_zeros(num_experts, dim))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum ``[T, D]``; see `Experts.forward`."""
        order, offsets = ops.group(experts_TK, self.num_experts)
        rows = ops.grouped_linear(x_TD, self.weight, self.bias, order, offsets, experts_TK.shape[1])
        return ops.combine(rows, order, gates_TK)

    def fold(self, chosen: Tensor, gates: Tensor, shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the choice, and the weighted sum of the maps of experts ``[K]`` as one map."""
        pairs = chosen_pairs(chosen, gates, self.num_experts)
        if pairs not in shared:
            made = nn.Linear(self.weight.shape[-1], self.weight.shape[-1], device="meta")
            weighted = [(self.weight[e].detach() * g, self.bias[e].detach() * g) for e, g in pairs]
            zeros = torch.zeros_like(self.weight[0]), torch.zeros_like(self.bias[0])
            made.weight = nn.Parameter(sum((w for w, _ in weighted), start=zeros[0]), requires_grad=False)
            made.bias = nn.Parameter(sum((b for _, b in weighted), start=zeros[1]), requires_grad=False)
            shared[pairs] = made
        return pairs, shared[pairs]

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"num_experts={self.num_experts}, dim={self.weight.shape[-1]}"


class StreamMask(nn.Module):
    """``m = 1 + Σ_j g_j (W_e x + b_e)``: the block reads x ⊙ m, and (1 − m) ⊙ x is added to what it returns.

    Args:
        routed: a `RoutedFFN` over `LinearExperts`.
    """

    def __init__(self, routed: RoutedFFN) -> None:
        super().__init__()
        self.routed = routed

    @property
    def deciding(self) -> tuple[int, ...]:
        """Those of the experts' layer; see `moefx.routing.static`."""
        return self.routed.deciding

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the choice, and a mask by the one map that it leaves."""
        choice, static = self.routed.fold(values, shared)
        return choice, StaticMask(static)

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return the mask in the shape of ``x``."""
        delta: Tensor = self.routed(x, *taps)
        return 1 + delta


class StaticMask(nn.Module):
    """``m = 1 + W x + b``: a `StreamMask` whose choice is known."""

    def __init__(self, delta: nn.Module) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor) -> Tensor:
        """Return the mask in the shape of ``x``."""
        delta: Tensor = self.delta(x)
        return 1 + delta


def complement(after: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``after + (1 − m) ⊙ x``."""
    return after + (1 - mask) * x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x ⊙ m``."""
    return torch.mul(x, mask)

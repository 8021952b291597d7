"""Linear-mask experts: a routed multiplicative mask of the residual stream around a block (Switch-DiT, 2403.09176).

Legend: T tokens, K experts per token, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.routing.moe import RoutedFFN


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

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return the mask in the shape of ``x``."""
        delta: Tensor = self.routed(x, *taps)
        return 1 + delta


def complement(after: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``after + (1 − m) ⊙ x``."""
    return after + (1 - mask) * x


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x ⊙ m``."""
    return torch.mul(x, mask)

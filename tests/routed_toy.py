"""A small routed FFN written by hand from the dialect, for tests of lowering and of the backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moefx import ops


class RoutedFFN(nn.Module):
    """x + routed FFN, top-k of E experts. Shapes: x [B, N, D]."""

    def __init__(
        self,
        width: int = 24,
        hidden: int = 40,
        experts: int = 4,
        slots: int = 2,
        act: Callable[[Tensor], Tensor] | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.experts, self.slots = experts, slots
        self.act = act or nn.GELU(approximate="tanh")
        self.router = nn.Linear(width, experts)
        self.w_in = nn.Parameter(torch.randn(experts, hidden * (1 + gated), width) / width**0.5)
        self.b_in = nn.Parameter(torch.randn(experts, hidden * (1 + gated)))
        self.w_out = nn.Parameter(torch.randn(experts, width, hidden) / hidden**0.5)
        self.b_out = nn.Parameter(torch.randn(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        gates, experts = self.router(tokens).float().softmax(-1).topk(self.slots, -1)
        order, offsets = ops.group(experts, self.experts)
        hidden = self.act(ops.grouped_linear(tokens, self.w_in, self.b_in, order, offsets, self.slots))
        rows = ops.grouped_linear(hidden, self.w_out, self.b_out, None, offsets, 1)
        return x + ops.combine(rows, order, gates).view(x.shape)

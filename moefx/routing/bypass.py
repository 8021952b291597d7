"""Tokens that bypass a feed-forward network: a switch per token, and a network that only runs on those switched on.

Legend: B samples, T tokens, D width, m hidden width of the router.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.routing.experts import Experts
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.record import RoutingRecord
from moefx.routing.threshold import ThresholdGate
from moefx.routing.weights import FFNWeights


class TokenSelect(KeepFloat32):
    """One logit per token: ``z = w₂·relu(W₁ x + b₁) + b₂``, computed in float32.

    Args:
        dim: D.
        hidden: m, by default D/16.
        start: b₂ at the start; +35 switches every token on.
        generator: source of W₁ and w₂.
        device: as for any module.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        start: float = 35.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or max(1, dim // 16)

        def normal(rows: int, columns: int) -> nn.Parameter:
            draw = torch.randn(rows, columns, generator=generator) * columns**-0.5
            return nn.Parameter(draw.to(device))

        self.weight_in, self.weight_out = normal(hidden, dim), normal(1, hidden)
        self.bias_in = nn.Parameter(torch.zeros(hidden, device=device))
        self.bias_out = nn.Parameter(torch.full((1,), start, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, T, 1]`` of ``[B, T, D]``."""
        with without_autocast(x):
            dtype = at_least_float32(x, self.weight_in)
            hidden = F.linear(x.to(dtype), self.weight_in.to(dtype), self.bias_in.to(dtype)).relu()
            return F.linear(hidden, self.weight_out.to(dtype), self.bias_out.to(dtype))


class TokenSwitch(ThresholdGate):
    """A hard switch per token, 1 or 0 with a straight-through gradient: the threshold gate of one group.

    Its share is that of the block's compute, ``fixed + (1 − fixed)·(mean of the switches)``: attention is paid by every
    token. Besides the ``budget`` there is the term ``minimum``, ``relu(minimum − mean of the switches)``, against a
    layer that dies (DyDiT, arXiv 2410.03456).

    Args:
        router: maps ``[B, T, D]`` to ``[B, T, 1]``.
        fixed: share of the block's compute that does not depend on the switch.
        minimum: share of the tokens below which a layer is penalised.
        options: of `ThresholdGate`.
    """

    def __init__(self, router: nn.Module, *, fixed: float = 0.0, minimum: float = 0.1, **options: Any) -> None:
        super().__init__(router, 2, **options)
        self.fixed, self.minimum = fixed, minimum
        old = self.record
        self.record = RoutingRecord(2, device=old.load.device, coefficients={**old.coefficients, "minimum": 2.0})

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return s ``[B, T]`` of ``[B, T, D]``."""
        return super().forward(x, *taps)[..., 1]

    def _remember(self, z: Tensor, gates: Tensor) -> None:
        on = (gates.detach() > 0.5).to(torch.int64).reshape(-1, 1)
        flat = z.reshape(-1, 1)
        self.record.update(torch.cat([torch.zeros_like(flat), flat], dim=-1), on, "softmax_topk")
        mean = mean_over_tokens(gates.flatten())
        share = self.fixed + (1 - self.fixed) * mean
        self.record.add("share", share)
        self.record.add("minimum", (self.minimum - mean).relu())
        if self.budget is not None:
            self.record.add("budget", (share - self.target.to(share.dtype)).square())


class BypassedFFN(nn.Module):
    """``y_i = s_i · FFN(h_i)``, with s from the token before its norm.

    With gradients every token is computed, because the switch of a token that is off learns from what it misses.
    Without, only the tokens that are on are multiplied: they are sorted to the front as by a router over one expert, so
    shapes do not depend on the switches, and nothing waits for the device.

    Args:
        switch: maps the stream to s ``[B, T]``.
        weights: of the dense network.
        act: its activation.
    """

    def __init__(self, switch: nn.Module, weights: FFNWeights, act: Any) -> None:
        super().__init__()
        self.switch = switch
        bias = weights.b_out
        self.b_out = None if bias is None else nn.Parameter(bias.detach())
        self.experts = Experts(_stacked(weights), act)

    def forward(self, h: Tensor, stream: Tensor) -> Tensor:
        """Map the network's input h ``[B, T, D]`` to ``[B, T, D]``; the switch reads ``stream`` ``[B, T, D]``."""
        s = self.switch(stream).reshape(-1, 1)
        if torch.is_grad_enabled():
            expert, gates = torch.zeros_like(s, dtype=torch.int64), s
        else:
            expert, gates = (s < 0.5).to(torch.int64), s.round()
        y: Tensor = self.experts(h.flatten(0, 1), expert, gates)
        if self.b_out is not None:
            y = y + (gates * self.b_out.to(gates.dtype)).to(y.dtype)
        return y.reshape(*h.shape[:2], y.shape[-1])


def _stacked(weights: FFNWeights) -> FFNWeights:
    """Return the dense weights as those of one expert, without the output bias."""

    def stack(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach().unsqueeze(0)

    return FFNWeights(
        w_in=weights.w_in.detach().unsqueeze(0),
        b_in=stack(weights.b_in),
        w_gate=stack(weights.w_gate),
        b_gate=stack(weights.b_gate),
        w_out=weights.w_out.detach().unsqueeze(0),
        b_out=None,
    )

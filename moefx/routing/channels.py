"""Routed channels of a feed-forward network: groups of hidden neurons that a gate switches (DyDiT, arXiv 2410.03456).

Legend: B samples, T tokens, D width, F hidden width, G groups of F/G neurons each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.experts import DenseFFN
from moefx.routing.static import reads_tokens
from moefx.routing.weights import FFNWeights


class ChannelGroups(DenseFFN):
    """``y = W_out act(m ⊙ (W_in x + b_in) [, m ⊙ (W_gate x + b_gate)]) + b_out`` with a mask m made of G gates.

    Neuron i belongs to group ``i // (F/G)``. The mask is applied *before* the activation, as in the released code, so a
    group that is off contributes ``W_out act(0)``: nothing for GELU, SiLU and ReLU. All gates 1 is the dense network.

    Args:
        weights: dense weights.
        act: pointwise, ``act(up)``, or ``act(up, gate)`` if the weights are gated.
        gate: maps ``(x, *taps)`` to gates ``[B, T, G]``, broadcastable over the tokens; `ThresholdGate` or one's own.
        groups: G, a divisor of F.

    Raises:
        OptionError: F is not divisible by G.
    """

    def __init__(self, weights: FFNWeights, act: Callable[..., Any], gate: nn.Module, groups: int) -> None:
        if groups < 1 or weights.hidden % groups:
            raise OptionError(
                f"cut {weights.hidden} neurons into {groups} groups", found="a remainder", do="use a divisor"
            )
        super().__init__(weights, act)
        self.gate, self.groups = gate, groups

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the extra tensors the gate reads."""
        return tuple(getattr(self.gate, "taps", ()))

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D_o]``."""
        mask = self.gate(x, *taps).repeat_interleave(self.w_in.shape[0] // self.groups, dim=-1)
        up = F.linear(x, self.w_in, self.b_in)
        up = (up * mask).to(up.dtype)
        if self.w_gate is None:
            hidden = self.act(up)
        else:
            hidden = self.act(up, (F.linear(x, self.w_gate, self.b_gate) * mask).to(up.dtype))
        y: Tensor = F.linear(hidden, self.w_out, self.b_out)
        return y

    @property
    def deciding(self) -> tuple[int, ...]:
        """Positions of the taps, if the gate reads nothing else; see `moefx.routing.static`."""
        tokens = reads_tokens(getattr(self.gate, "router", None))
        return () if tokens else tuple(range(1, 1 + len(self.taps)))

    @torch.no_grad()
    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the groups that are on for these values of the taps, and the network of their neurons alone."""
        gates = self.gate(values[0].new_zeros((1, 1, 1)), *values).reshape(-1)
        groups = tuple(torch.nonzero(gates > 0.5).flatten().tolist())
        if groups not in shared:
            shared[groups] = self.kept(groups)
        return groups, shared[groups]

    @torch.no_grad()
    def kept(self, groups: Sequence[int]) -> DenseFFN:
        """Return the dense network that is left when only ``groups`` are on: their neurons, cut out of the weights."""
        index = torch.arange(self.w_in.shape[0], device=self.w_in.device).reshape(self.groups, -1)
        off = index[[g for g in range(self.groups) if g not in set(groups)]].flatten()
        weights = self.weights().neurons(lambda tensor, axis: tensor.index_select(axis, index[list(groups)].flatten()))
        zero = self.w_in.new_zeros(1)
        rest = self.act(zero) if self.w_gate is None else self.act(zero, zero)
        constant = self.w_out.index_select(-1, off).sum(-1) * rest
        bias = constant if weights.b_out is None else weights.b_out + constant
        return DenseFFN(FFNWeights(**{**vars(weights), "b_out": bias}), self.act)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"{super().extra_repr()}, groups={self.groups}"

"""Feed-forward experts: a stack of FFNs of one shape, each token through the few that were chosen for it.

Legend: T tokens, K experts per token, C tokens per expert, R rows (T·K sorted by expert, or E·C), E experts, D width, m
hidden width of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx import ops
from moefx.errors import InputError
from moefx.routing.expert_loop import loop_pays, run_loop
from moefx.routing.weights import FFNWeights


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach())


class _FeedForward(nn.Module):
    """The parameters and the activation that the dense and the stacked FFN have in common."""

    def __init__(self, weights: FFNWeights, act: Callable[..., Any]) -> None:
        super().__init__()
        self.w_in = nn.Parameter(weights.w_in.detach())
        self.b_in = _parameter(weights.b_in)
        self.w_gate = _parameter(weights.w_gate)
        self.b_gate = _parameter(weights.b_gate)
        self.w_out = nn.Parameter(weights.w_out.detach())
        self.b_out = _parameter(weights.b_out)
        self.act = act

    def weights(self) -> FFNWeights:
        """Return the parameters as data, sharing storage."""
        return FFNWeights(
            w_in=self.w_in, b_in=self.b_in, w_gate=self.w_gate, b_gate=self.b_gate, w_out=self.w_out, b_out=self.b_out
        )

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"w_in={tuple(self.w_in.shape)}, w_out={tuple(self.w_out.shape)}, gated={self.w_gate is not None}"


class DenseFFN(_FeedForward):
    """One dense FFN, ``w_out · act(w_in x + b_in [, w_gate x + b_gate]) + b_out``; used for shared experts.

    Args:
        weights: dense weights; n shared experts of width m are one dense FFN of width n·m.
        act: pointwise, ``act(up)``, or ``act(up, gate)`` if the weights are gated.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D_o]``."""
        up = F.linear(x, self.w_in, self.b_in)
        h = self.act(up) if self.w_gate is None else self.act(up, F.linear(x, self.w_gate, self.b_gate))
        y: Tensor = F.linear(h, self.w_out, self.b_out)
        return y


class Experts(_FeedForward):
    """E stacked FFNs of one shape behind one hoisted output bias.

    ``y_t = Σ_j gates[t, j] · w_out[e] · act(w_in[e] x_t + b_in[e] [, w_gate[e] x_t + b_gate[e]]) + b_out``
    with e = experts[t, j].

    Dropless: the rows are sorted by expert, multiplied group by group and summed back; no capacity, no padding, and no
    number that Python sees depends on the routing, except on a CPU without gradients (`moefx.routing.expert_loop`). An
    index outside [0, E) contributes nothing.

    Args:
        weights: stacked weights ``[E, ...]``; see `FFNWeights`.
        act: pointwise, ``act(up)``, or ``act(up, gate)`` if the weights are gated. A function or an ``nn.Module``.
    """

    def __init__(self, weights: FFNWeights, act: Callable[..., Any]) -> None:
        if weights.num_experts is None:
            raise InputError(
                "experts from dense weights", found=f"w_in {tuple(weights.w_in.shape)}", do="stack them: [E, m, D]"
            )
        super().__init__(weights, act)
        self.num_experts = weights.num_experts

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts.

        Args:
            x_TD: tokens.
            experts_TK: int64 expert indices.
            gates_TK: float32 (float64 with float64 tokens); the sum is accumulated in at least float32.

        Returns:
            ``[T, D_o]`` in the dtype of the rows.
        """
        k = experts_TK.shape[1]
        order, offsets = ops.group(experts_TK, self.num_experts)
        if loop_pays(x_TD, self.weights(), gates_TK, offsets):
            return self._with_bias(run_loop(x_TD, self.weights(), self.act, order, offsets, gates_TK))
        stack = ops.FFNStack(self.w_in, self.b_in, self.w_gate, self.b_gate, self.w_out)
        rows = ops.grouped_ffn(x_TD, stack, self.act, order, offsets, k)
        return self._with_bias(ops.combine(rows, order, gates_TK))

    def by_expert(self, x_TD: Tensor, tokens_EC: Tensor, gates_EC: Tensor) -> Tensor:
        """Return the weighted sum over the experts that chose a token: a plain batched product, since all are equal.

        Args:
            x_TD: tokens.
            tokens_EC: int64 token indices, C per expert; T or more means none.
            gates_EC: float32 (float64 with float64 tokens).

        Returns:
            ``[T, D_o]`` in the dtype of the tokens; the bias alone where nobody chose a token.
        """
        tokens = x_TD.shape[0]
        index_R = tokens_EC.reshape(-1).clamp(max=tokens)
        padded_TD = torch.cat([x_TD, x_TD.new_zeros((1, x_TD.shape[1]))])
        rows_ECD = padded_TD.index_select(0, index_R).view(*tokens_EC.shape, x_TD.shape[1])
        h = _batched(rows_ECD, self.w_in, self.b_in)
        h = self.act(h) if self.w_gate is None else self.act(h, _batched(rows_ECD, self.w_gate, self.b_gate))
        y_RD = torch.bmm(h, self.w_out.mT).flatten(0, 1)
        return self._with_bias(ops.scatter(y_RD, index_R, gates_EC.reshape(-1), tokens))

    def _with_bias(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)


def _batched(rows_ECD: Tensor, weight_EFD: Tensor, bias_EF: Tensor | None) -> Tensor:
    h = torch.bmm(rows_ECD, weight_EFD.mT)
    return h if bias_EF is None else h + bias_EF.unsqueeze(1).to(h.dtype)

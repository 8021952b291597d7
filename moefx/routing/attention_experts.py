"""Mixture of attention experts: experts with queries and outputs of their own, over keys and values that all share.

JetMoE's MoA (arXiv 2404.07413). Expert e is the pair (W_q^e, W_o^e). A token goes to K experts and so has K queries,
one per *slot*; each slot attends to all keys, and the results meet in the output::

    y = Σ_j g_j W_o^{e_j} attend(W_q^{e_j} x + b_q^{e_j}; keys, values) + b_o

Copies of one attention whose gates sum to one are that attention: equal queries attend equally. Two modules, because
the attention itself lies between them and stays as it is.

Legend: B samples, T tokens, D width, N = H·d features of all heads, E experts, K slots, R = B·T·K rows by expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefx import ops
from moefx.errors import OptionError
from moefx.routing.normalise import default_mode, normalise
from moefx.routing.precision import at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.select import top_k


class QueryExperts(nn.Module):
    """Choose K experts per token and project its K queries.

    Args:
        router: maps ``[B, T, D]`` to logits ``[B, T, E]``.
        weight: W_q ``[E, N, D]``.
        bias: b_q ``[E, N]`` or None.
        top_k: K.
        mode: gate normalisation; None for `default_mode`. JetMoE: ``topk_softmax``, gates of the selected sum to one.

    Attributes:
        record: statistics and loss terms; by default 0.01 · balance + 0.001 · z, as in the released code.
    """

    def __init__(
        self, router: nn.Module, weight: Tensor, bias: Tensor | None, *, top_k: int = 2, mode: str | None = None
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= weight.shape[0]:
            raise OptionError(f"top {top_k} of {weight.shape[0]} attention experts", do="1 <= top_k <= experts")
        self.router, self.num_experts, self.top_k = router, weight.shape[0], top_k
        self.mode = mode or default_mode(weight.shape[0], top_k)
        self.w_q = nn.Parameter(weight.detach())
        self.b_q = None if bias is None else nn.Parameter(bias.detach())
        self.record = RoutingRecord(self.num_experts, device=weight.device, coefficients={"balance": 0.01, "z": 0.001})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return ``(order [R], offsets [E + 1], gates [B·T, K], queries of slot 0 [B, T, N], … of slot K − 1)``."""
        logits = self.router(x).reshape(-1, self.num_experts)
        logits = logits.to(at_least_float32(logits))
        experts = top_k(logits.detach(), self.top_k)
        gates = normalise(logits, experts, self.mode)
        self.record.update(logits, experts, self.mode)
        order, offsets = ops.group(experts, self.num_experts)
        tokens = x.reshape(-1, x.shape[-1]).to(self.w_q.dtype)
        rows = ops.grouped_linear(tokens, self.w_q, self.b_q, order, offsets, self.top_k)
        slots = rows.index_select(0, order.argsort()).reshape(*x.shape[:-1], self.top_k, rows.shape[-1])
        return order, offsets, gates, *slots.unbind(-2)

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"w_q={tuple(self.w_q.shape)}, top_k={self.top_k}, mode={self.mode!r}"


class OutputExperts(nn.Module):
    """Project what each slot attended to with the output matrix of its expert, and sum over the slots.

    Args:
        weight: W_o ``[E, D, N]``.
        bias: b_o ``[D]``, added once, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.w_out = nn.Parameter(weight.detach())
        self.b_out = None if bias is None else nn.Parameter(bias.detach())

    def forward(self, order: Tensor, offsets: Tensor, gates: Tensor, *slots: Tensor) -> Tensor:
        """Return y ``[B, T, D]`` from the attention's results ``[B, T, N]`` per slot and `QueryExperts`' choice."""
        rows = torch.stack(slots, dim=-2).reshape(-1, slots[0].shape[-1]).index_select(0, order)
        rows = ops.grouped_linear(rows.to(self.w_out.dtype), self.w_out, None, None, offsets)
        y = ops.combine(rows, order, gates)
        y = y if self.b_out is None else y + self.b_out.to(y.dtype)
        return y.reshape(*slots[0].shape[:-1], y.shape[-1])

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"w_out={tuple(self.w_out.shape)}"

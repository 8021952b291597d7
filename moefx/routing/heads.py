"""Mixture of heads: a gate for every token and attention head (MoH, arXiv 2410.11842).

Legend: B samples, T tokens, D width, H heads, d head width, h_s shared and h_r = H − h_s routed heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.ops.head_attention import head_attention
from moefx.routing.normalise import normalise
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.record import RoutingRecord
from moefx.routing.select import top_k


class HeadGate(KeepFloat32):
    """Gates ``[B, T, H]``: shared heads always on, the ``top_k`` best routed heads per token on, the others exactly 0.

    With p_r = softmax(W_r x) and S its top k, all in float32 and free of biases::

        routed:   g_i = a_2 · k · p_r,i / Σ_S p_r      for i in S, else 0
        shared:   g_i = a_1 · h_s · softmax(W_s x)_i
        balance:  [a_1, a_2] = 2 · softmax(W_h x)      both 1 if there are no shared, or no routed, heads

    The mean gate over active heads is 1. The factors k, h_s and 2 are those of the released code (the paper does not
    print them). Zero routers and k = h_r make every gate exactly 1, hence the dense attention; with smaller k the
    dropped heads are missing, which is not exact.

    Args:
        dim: D.
        num_heads: H.
        shared: h_s; which ones is ``shared_heads``.
        top_k: routed heads per token, 0 ≤ k ≤ h_r; None means all. With h_r = 0 nothing is selected.
        shared_heads: indices of the shared heads; None means the first h_s.
        std: standard deviation of the routers; 0 is the exact start.
        generator: source of the routers.
        device: as for any module.

    Attributes:
        record: load, probabilities and loss terms over the h_r routed heads; None if there are none. The balance loss
            has coefficient 0.01·k: the paper counts f per token, so that Σ f = k, and takes 0.01.
    """

    order: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared: int = 0,
        top_k: int | None = None,
        shared_heads: Sequence[int] | None = None,
        std: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        routed = num_heads - shared
        self.num_heads, self.shared, self.routed = num_heads, shared, routed
        self.top_k = routed if top_k is None else top_k
        layout = _layout(num_heads, shared, self.top_k, shared_heads).to(device)

        def rows(n: int) -> nn.Parameter:
            draw = torch.randn(n, dim, generator=generator) * std if std else torch.zeros(n, dim)
            return nn.Parameter(draw.to(device))

        self.shared_weight = rows(shared) if shared else None
        self.routed_weight = rows(routed) if routed and self.top_k else None
        self.balance_weight = rows(2) if shared and routed and self.top_k else None
        self.register_buffer("order", layout.argsort())  # saved: the rows of the routers mean nothing without it
        self.record = _record(routed, self.top_k, device) if self.routed_weight is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates ``[B, T, H]`` (float32; float64 for float64 input) of ``x`` ``[B, T, D]``."""
        with without_autocast(x):
            parts = []
            if self.shared_weight is not None:
                parts.append(self._logits(x, self.shared_weight).softmax(-1) * self.shared)
            if self.routed_weight is not None:
                parts.append(self._routed(x, self.routed_weight))
            elif self.routed:
                parts.append(parts[0].new_zeros(()).expand(*x.shape[:-1], self.routed))
            if self.balance_weight is not None:
                balance = self._logits(x, self.balance_weight).softmax(-1) * 2
                parts = [parts[0] * balance[..., :1], parts[1] * balance[..., 1:]]
            gates = torch.cat(parts, dim=-1)
        return gates.index_select(-1, self.order)

    def _routed(self, x: Tensor, weight: Tensor) -> Tensor:
        logits = self._logits(x, weight)
        heads = top_k(logits.detach(), self.top_k)
        gates = normalise(logits, heads, "softmax_topk_renorm", scale=float(self.top_k))
        if self.record is not None:
            self.record.update(logits.flatten(0, -2), heads.flatten(0, -2), "softmax_topk_renorm")
        return torch.zeros_like(logits).scatter(-1, heads, gates)

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        dtype = at_least_float32(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    def extra_repr(self) -> str:
        """Describe the gate in ``print(model)``."""
        return f"heads={self.num_heads}, shared={self.shared}, routed={self.routed}, top_k={self.top_k}"


class QueryGate(KeepFloat32):
    """Gates ``[B, T, H]`` of 1 and 0 without parameters: the heads whose queries are longest are on.

    How MoH converts a trained model (continue-tuning of LLaMA3-8B: half of the heads shared, 8 of 16 routed)::

        z = ‖q_i‖ / std_j ‖q_j‖          over the routed heads
        g_i = 1 + p_i − stopgrad(p_i)    p = softmax(z), for the k routed heads with the largest z, else 0

    Shared heads have gate 1. The straight-through term is zero in value; it carries a gradient to the queries.

    Args:
        num_heads: H.
        shared: h_s, always on; which ones is ``shared_heads``, None means the first.
        top_k: k routed heads per token; None means all, which is the identity.
        shared_heads: indices of the shared heads.
        device: as for any module.

    Attributes:
        record: statistics over the routed heads, balance coefficient 0.01·k; None if there are none.
    """

    layout: Tensor
    order: Tensor

    def __init__(
        self,
        num_heads: int,
        *,
        shared: int = 0,
        top_k: int | None = None,
        shared_heads: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.shared, self.routed = num_heads, shared, num_heads - shared
        self.top_k = self.routed if top_k is None else top_k
        layout = _layout(num_heads, shared, self.top_k, shared_heads).to(device)
        self.register_buffer("layout", layout)
        self.register_buffer("order", layout.argsort())
        self.record = _record(self.routed, self.top_k, device) if self.routed and self.top_k else None

    def forward(self, q: Tensor) -> Tensor:
        """Return the gates of queries ``[B, T, H, d]``, in float32 (float64 for float64 queries)."""
        norms = torch.linalg.vector_norm(q, dim=-1, dtype=at_least_float32(q)).index_select(-1, self.layout)
        shared, routed = norms.split([self.shared, self.routed], dim=-1)
        gates = torch.zeros_like(routed)
        if self.record is not None:
            centred = routed - routed.mean(-1, keepdim=True)
            spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / max(self.routed - 1, 1) ** 0.5
            z = routed / spread.clamp_min(torch.finfo(spread.dtype).eps)
            heads = top_k(z.detach(), self.top_k)
            gates = gates.scatter(-1, heads, normalise(z, heads, "ste"))
            self.record.update(z.flatten(0, -2), heads.flatten(0, -2), "ste")
        return torch.cat([torch.ones_like(shared), gates], dim=-1).index_select(-1, self.order)

    def extra_repr(self) -> str:
        """Describe the gate in ``print(model)``."""
        return f"heads={self.num_heads}, shared={self.shared}, routed={self.routed}, top_k={self.top_k}"


def _record(routed: int, k: int, device: torch.device | str | None) -> RoutingRecord:
    return RoutingRecord(routed, device=device, coefficients={"balance": 0.01 * k})


def apply_head_gates(y: Tensor, gates: Tensor) -> Tensor:
    """Multiply each head's output by its gate, before the output projection.

    Args:
        y: ``[B, T, H·d]``, heads in order.
        gates: ``[B, T, H]``, or one row for all tokens or samples.

    Returns:
        ``[B, T, H·d]`` in the dtype of ``y``; the product is taken in the wider of the two dtypes.
    """
    heads = gates.shape[-1]
    fits = all(own in (1, size) for own, size in zip(gates.shape[:-1], y.shape[:-1], strict=False))
    if y.shape[-1] % heads or gates.ndim != y.ndim or not fits:
        raise InputError(
            "gate attention heads",
            found=f"outputs {tuple(y.shape)}, gates {tuple(gates.shape)}",
            do="pass [B, T, H*d] and [B, T, H]",
        )
    y_BTHd = y.reshape(*y.shape[:-1], heads, y.shape[-1] // heads)
    return (y_BTHd * gates.unsqueeze(-1)).reshape(y.shape).to(y.dtype)


def attend_with_heads(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None = None) -> Tensor:
    """Return gated attention ``[B, H, T, d]`` of which heads with a gate of zero are not computed.

    Args:
        q, k, v: ``[B, H, T, d]``, keys and values with tokens of their own.
        gates: ``[B, T, H]``; a zero gate gets no gradient, so gates that learn to come back must not be zero.
        scale: of the scores; None for 1/√d.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return head_attention(q, k.to(q.dtype), v.to(q.dtype), gates, scale).transpose(1, 2)


def _layout(num_heads: int, shared: int, k: int, shared_heads: Sequence[int] | None) -> Tensor:
    """Return which head column j of the computed gates belongs to: the shared ones first. Its argsort is the inverse.

    Raises:
        OptionError: an impossible number or choice of heads.
    """
    first = list(range(shared)) if shared_heads is None else list(shared_heads)
    sound = 0 <= shared <= num_heads and 0 <= k <= num_heads - shared and shared + k > 0
    if not sound or len(set(first)) != shared or any(not 0 <= head < num_heads for head in first):
        raise OptionError(
            f"{shared} shared heads {first} and {k} of {num_heads - shared} routed",
            found=f"{num_heads} heads",
            do="0 <= shared <= heads, 0 <= top_k <= heads - shared, at least one active, shared_heads distinct",
        )
    return torch.tensor(first + [h for h in range(num_heads) if h not in set(first)])

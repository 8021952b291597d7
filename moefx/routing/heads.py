"""Mixture of heads: a gate for every token and attention head (MoH, arXiv 2410.11842).

Legend: B samples, T tokens, D width, H heads, d head width, h_s shared and h_r = H − h_s routed heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
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
        record: load, probabilities and loss terms over the h_r routed heads; None if there are none. The paper's
            balance loss is k times ours (it counts f per token).
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
        first = list(range(shared)) if shared_heads is None else list(shared_heads)
        _check(num_heads, shared, self.top_k, first)

        def rows(n: int) -> nn.Parameter:
            draw = torch.randn(n, dim, generator=generator) * std if std else torch.zeros(n, dim)
            return nn.Parameter(draw.to(device))

        self.shared_weight = rows(shared) if shared else None
        self.routed_weight = rows(routed) if routed and self.top_k else None
        self.balance_weight = rows(2) if shared and routed and self.top_k else None
        # Column j of the computed gates (shared first) belongs to head layout[j]; `order` is the inverse.
        layout = torch.tensor(first + [h for h in range(num_heads) if h not in set(first)], device=device)
        self.register_buffer("order", layout.argsort())  # saved: the rows of the routers mean nothing without it
        self.record = RoutingRecord(routed, device=device) if self.routed_weight is not None else None

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


def apply_head_gates(y: Tensor, gates: Tensor) -> Tensor:
    """Multiply each head's output by its gate, before the output projection.

    Args:
        y: ``[B, T, H·d]``, heads in order.
        gates: ``[B, T, H]``.

    Returns:
        ``[B, T, H·d]`` in the dtype of ``y``; the product is taken in the wider of the two dtypes.
    """
    heads = gates.shape[-1]
    if y.shape[-1] % heads or y.shape[:-1] != gates.shape[:-1]:
        raise InputError(
            "gate attention heads",
            found=f"outputs {tuple(y.shape)}, gates {tuple(gates.shape)}",
            do="pass [B, T, H*d] and [B, T, H]",
        )
    y_BTHd = y.reshape(*gates.shape, y.shape[-1] // heads)
    return (y_BTHd * gates.unsqueeze(-1)).reshape(y.shape).to(y.dtype)


def _check(num_heads: int, shared: int, k: int, first: Sequence[int]) -> None:
    routed = num_heads - shared
    sound = 0 <= shared <= num_heads and 0 <= k <= routed and shared + k > 0
    if not sound or len(set(first)) != shared or any(not 0 <= head < num_heads for head in first):
        raise OptionError(
            f"{shared} shared heads {list(first)} and {k} of {routed} routed",
            found=f"{num_heads} heads",
            do="0 <= shared <= heads, 0 <= top_k <= heads - shared, at least one active, shared_heads distinct",
        )

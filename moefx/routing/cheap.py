"""Experts that compute nothing, beside those that do: zero, copy and constant experts (MoE++, arXiv 2410.07348).

Legend: T tokens, K experts per token, D width, E experts of both kinds, C constant experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.experts import Experts
from moefx.routing.precision import KeepFloat32, at_least_float32


class CheapExperts(KeepFloat32):
    """FFN experts, then zero experts 0, copy experts x, and constant experts α₁x + α₂v with [α₁, α₂] = softmax(W x).

    Stands where `Experts` stands. A token that chose a zero expert gives that expert's gate to its others (the released
    code sets it to zero and renormalises), so its gates sum to one, or to zero if it chose zero experts only. The
    indices of cheap experts lie behind those of the FFNs, where the dialect leaves rows out: they cost no product.

    Args:
        experts: the FFNs.
        dim: D.
        zero, copy, constant: numbers of cheap experts.
        tau: η of the cheap experts in the balance loss ``weighted_balance``; below 1 it sends more tokens to them.
        generator: source of v and W.
    """

    balance_weights: Tensor

    def __init__(
        self,
        experts: Experts,
        dim: int,
        *,
        zero: int = 1,
        copy: int = 1,
        constant: int = 2,
        tau: float = 0.75,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(zero, copy, constant) < 0:
            raise OptionError(f"{zero} zero, {copy} copy, {constant} constant experts", found="a negative number")
        if copy + constant and experts.w_out.shape[-2] != dim:
            raise OptionError(
                "copy and constant experts", found="an FFN that changes the width", do="use zero ones only"
            )
        self.experts, self.zero, self.copy, self.constant = experts, zero, copy, constant
        self.num_experts = experts.num_experts + zero + copy + constant
        std = dim**-0.5
        # Per constant expert the two rows of W and the vector v.
        self.w_mix = nn.Parameter(torch.randn(constant, 2, dim, generator=generator) * std) if constant else None
        self.value = nn.Parameter(torch.randn(constant, dim, generator=generator) * std) if constant else None
        weights = [1.0] * experts.num_experts + [tau] * (zero + copy + constant)
        self.register_buffer("balance_weights", torch.tensor(weights), persistent=False)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum ``[T, D]``; see `Experts.forward`."""
        first = self.experts.num_experts
        is_zero = (experts_TK >= first) & (experts_TK < first + self.zero)
        gates_TK = gates_TK.masked_fill(is_zero, 0)
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(gates_TK.dtype).tiny)
        y: Tensor = self.experts(x_TD, experts_TK, gates_TK)
        first += self.zero
        wide = x_TD.to(at_least_float32(x_TD, gates_TK))
        cheap = self._gate(experts_TK, gates_TK, first, self.copy).unsqueeze(-1) * wide if self.copy else None
        if self.w_mix is not None and self.value is not None:
            part = self._constants(wide, experts_TK, gates_TK, first + self.copy)
            cheap = part if cheap is None else cheap + part
        return y if cheap is None else (y + cheap).to(y.dtype)

    def _constants(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor, first: int) -> Tensor:
        assert self.w_mix is not None
        assert self.value is not None
        total = torch.zeros_like(x_TD)
        for c in range(self.constant):
            mix = (x_TD @ self.w_mix[c].to(x_TD.dtype).T).softmax(-1)
            y = mix[:, :1] * x_TD + mix[:, 1:] * self.value[c].to(x_TD.dtype)
            total = total + self._gate(experts_TK, gates_TK, first + c, 1).unsqueeze(-1) * y
        return total

    @staticmethod
    def _gate(experts_TK: Tensor, gates_TK: Tensor, first: int, count: int) -> Tensor:
        """Return the sum of each token's gates of ``count`` experts from ``first`` on, ``[T]``."""
        mine = (experts_TK >= first) & (experts_TK < first + count)
        return gates_TK.masked_fill(~mine, 0).sum(-1)

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"num_experts={self.num_experts}, zero={self.zero}, copy={self.copy}, constant={self.constant}"

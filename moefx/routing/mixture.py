"""Experts that are mixtures of weights, merged before anything is computed (Remix-DiT, arXiv 2412.05628).

Legend: B samples, K basis FFNs, D width, F hidden width, N timestep intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.routing.precision import KeepFloat32
from moefx.routing.record import RoutingRecord
from moefx.routing.scorers import TableRouter
from moefx.routing.static import FusedFFN, FusedWeights, reads_tokens
from moefx.routing.weights import FFNWeights

NAMES = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")


def prior_basis(intervals: int, bases: int) -> Tensor:
    """Return the basis ``⌊e·K/N⌋`` that interval e leans on, ``[N]``."""
    return torch.arange(intervals) * bases // intervals


def leaning_table(intervals: int, bases: int, generator: torch.Generator, *, lean: float = 3.0) -> Tensor:
    """Return the start of the coefficients ``[N, K]``: normal, plus ``lean`` at each interval's prior basis."""
    table = torch.randn(intervals, bases, generator=generator)
    return table + lean * F.one_hot(prior_basis(intervals, bases), bases)


class MixedFFN(KeepFloat32):
    """An FFN whose weights are ``W = Σ_k a_k W_k`` (biases likewise), ``a = softmax(table[interval of t])``.

    Each sample has its own mixture, so batches of mixed timesteps are right, which they are not in the released code;
    one timestep for the batch merges once. Equal bases are the dense FFN for any coefficients.

    Args:
        router: `TableRouter` over the K bases, or another that returns one row of logits per sample.
        dense: the FFN of which every basis is a copy.
        bases: K.
        act: pointwise function.
        prior: coefficient of the term ``prior``, the cross-entropy of the table with each interval's prior basis; it
            falls to zero along a line as training proceeds.
    """

    def __init__(
        self, router: TableRouter, dense: FFNWeights, bases: int, act: Callable[..., Any], *, prior: float = 1e-4
    ) -> None:
        super().__init__()
        self.router, self.bases, self.act, self.prior = router, bases, act, prior
        self.mixed = nn.ParameterDict(
            {
                name: nn.Parameter(torch.stack([value.detach()] * bases))
                for name in NAMES
                if (value := getattr(dense, name)) is not None
            }
        )
        self.record = RoutingRecord(bases, device=dense.w_in.device, coefficients={"prior": prior})
        self.taps = router.taps

    def set_progress(self, progress: float) -> None:
        """Let the prior fade: its coefficient is ``prior · (1 − progress)``."""
        self.record.coefficients = {"prior": self.prior * (1 - progress)}

    def coefficients(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return a ``[B, K]``, or ``[1, K]`` for one timestep of all samples, and record it."""
        logits = self.router(x, *taps).reshape(-1, self.bases)
        self.record.update(logits, torch.arange(self.bases, device=logits.device).expand(logits.shape), "soft")
        if torch.is_grad_enabled():
            table = self.router.table
            target = prior_basis(self.router.entries, self.bases).to(table.device)
            self.record.add("prior", F.cross_entropy(table, target))
        a: Tensor = logits.softmax(-1)
        return a

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, ..., D]`` to ``[B, ..., D_o]``."""
        a_BK = self.coefficients(x, *taps)
        merged = {name: torch.einsum("bk,k...->b...", a_BK.to(w), w) for name, w in self.mixed.items()}
        by_sample = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        tokens = by_sample if a_BK.shape[0] == x.shape[0] else x.reshape(1, -1, x.shape[-1])
        up = _linear(tokens, merged["w_in"], merged.get("b_in"))
        gate = _linear(tokens, merged["w_gate"], merged.get("b_gate")) if "w_gate" in merged else None
        hidden = self.act(up) if gate is None else self.act(up, gate)
        y = _linear(hidden, merged["w_out"], merged.get("b_out"))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @property
    def deciding(self) -> tuple[int, ...]:
        """Positions of the taps, if the router reads nothing else; see `moefx.routing.static`."""
        return () if reads_tokens(self.router) else tuple(range(1, 1 + len(self.taps)))

    @torch.no_grad()
    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the coefficients, and the FFN that they mix."""
        a_K = self.coefficients(values[0].new_zeros((1, 1, 1)), *values)[0]
        choice = tuple(a_K.tolist())
        if choice not in shared:
            merged = {name: torch.einsum("k,k...->...", a_K.to(w), w) for name, w in self.mixed.items()}
            shared[choice] = FusedWeights(FFNWeights(**merged))
        return choice, FusedFFN(shared[choice], None, self.act)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"bases={self.bases}"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x, weight.mT)
    return y if bias is None else y + bias.unsqueeze(1).to(y.dtype)

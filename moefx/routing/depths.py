"""Mixture of depths: a block runs on the tokens that need it (arXiv 2404.02258, 2410.13859, 2412.04449).

Legend: B samples, T tokens, D width, C = ⌊capacity·T⌋ tokens that pass the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.record import RoutingRecord
from moefx.routing.tokens import gather_tokens, put_tokens, spread

Weight = Literal["identity", "one_plus_tanh", "probability"]
WEIGHTS: Final = ("identity", "one_plus_tanh", "probability")
LEVELS: Final = 16  # steps of a capacity that changes over training: each is another shape


class Selection(NamedTuple):
    """The tokens that pass: positions ``tokens`` [B, C], int64 ascending; ``weights`` [B, T] of all."""

    tokens: Tensor
    weights: Tensor


class TokenRouter(KeepFloat32):
    """Choose the C highest-scoring tokens of each sample, and a weight for every token.

    The score is linear, z_i = w·x_i + b, and the weight one of

    ==============  ================  ====================================================================
    identity        z                 mixture of depths; b = 1 and w = 0 start it at 1
    one_plus_tanh   1 + α·tanh(z)     p-MoD; w = b = 0 start it at 1
    probability     softmax(z)₁       γ-MoD: two rows z = (z₀, z₁) without bias; 0.5 at the start
    ==============  ================  ====================================================================

    C depends on T only, so shapes are static; selection is per sample, so a sample's result does not depend on its
    batch; the selected tokens keep their order. A zero w has only ties: ``ties`` says which tokens they go to.

    In training it records the routing; the term ``selection`` is the cross-entropy of z, as a logit of "passes", with
    what was selected.

    Args:
        dim: D.
        capacity: fraction of tokens that pass, 0 < capacity ≤ 1.
        weight: how a score becomes a weight.
        alpha: α.
        bias: have b (identity and one_plus_tanh); the paper of the former has none.
        std: standard deviation of w at the start.
        ties: ``first`` tokens, or tokens ``spread`` over the sequence.
        warm_up: fraction of the training over which the capacity falls from 1 (see `set_progress`).
        losses: coefficients of the terms.
        generator: source of w.
        device: as for any module.
    """

    def __init__(
        self,
        dim: int,
        capacity: float = 1.0,
        *,
        weight: Weight = "identity",
        alpha: float = 0.2,
        bias: bool = True,
        std: float = 0.0,
        ties: Literal["first", "spread"] = "first",
        warm_up: float = 0.0,
        losses: Mapping[str, float] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise OptionError(f"route tokens with capacity {capacity}", found="out of range", do="0 < capacity <= 1")
        if weight not in WEIGHTS:
            raise OptionError(f"weigh tokens by {weight!r}", found="unknown", do=f"one of {', '.join(WEIGHTS)}")
        self.capacity, self.form, self.alpha = capacity, weight, alpha
        self.ties, self.warm_up = ties, warm_up
        self.share = _rational(capacity)
        rows = 2 if weight == "probability" else 1
        draw = torch.randn(rows, dim, generator=generator) * std if std else torch.zeros(rows, dim)
        self.weight = nn.Parameter(draw.to(device))
        start = torch.full((rows,), float(weight == "identity"), device=device)
        self.bias = nn.Parameter(start) if bias and weight != "probability" else None
        self.record = RoutingRecord(2, device=device, coefficients=losses or {})

    def set_progress(self, progress: float) -> None:
        """Let the capacity fall from 1 to its value over the first ``warm_up`` of the training, in `LEVELS` steps.

        Every step is another number of tokens, and so a new graph for a compiler. Without a call it has its value.
        """
        done = 1.0 if self.warm_up == 0 else min(1.0, progress / self.warm_up)
        self.share = _rational(1 - (1 - self.capacity) * math.floor(done * LEVELS) / LEVELS)

    def tokens(self, total: int) -> int:
        """Return C for T = ``total``; an int, or a symbolic one for a symbolic total."""
        numerator, denominator = self.share
        return total * numerator // denominator

    def logits(self, x: Tensor) -> Tensor:
        """Return z ``[B, T, 1]``, two rows for a probability, float32 (float64 for float64), of ``x`` ``[B, T, D]``."""
        with without_autocast(x):
            dtype = at_least_float32(x, self.weight)
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def scores(self, x: Tensor) -> Tensor:
        """Return the weights ``[B, T]``, which are also what the selection ranks, of ``x`` ``[B, T, D]``."""
        return self._weights(self.logits(x))

    def _weights(self, z: Tensor) -> Tensor:
        if self.form == "probability":
            return z.softmax(-1)[..., 1]
        return z.squeeze(-1) if self.form == "identity" else 1 + self.alpha * z.squeeze(-1).tanh()

    def forward(self, x: Tensor) -> Selection:
        """Return the C best tokens of each sample of ``x`` ``[B, T, D]``, and all weights."""
        z = self.logits(x)
        chosen = self._best_first(z)[..., : self.tokens(x.shape[1])].sort(dim=-1).values
        if self.training:
            self._remember(z, chosen, torch.ones_like(chosen))
        return Selection(chosen, self._weights(z))

    def _best_first(self, z: Tensor) -> Tensor:
        """Return all positions ``[B, T]``, those of the highest scores first."""
        # Ranked by the logit: a saturated weight would tie.
        scores = (z[..., 1] - z[..., 0] if self.form == "probability" else z.squeeze(-1)).detach()
        if self.ties == "first":
            return scores.sort(dim=-1, descending=True, stable=True).indices
        order = spread(scores.shape[-1], scores.device)
        return order[scores[..., order].sort(dim=-1, descending=True, stable=True).indices]

    def _remember(self, z: Tensor, chosen: Tensor, passing: Tensor) -> None:
        passes = torch.zeros(z.shape[:2], dtype=torch.int64, device=z.device).scatter(1, chosen, passing).flatten()
        both = z if self.form == "probability" else torch.cat([torch.zeros_like(z), z], dim=-1)
        both = both.flatten(0, 1)
        self.record.update(both, passes.unsqueeze(-1), "softmax_topk")
        self.record.add("selection", mean_over_tokens(F.cross_entropy(both, passes, reduction="none")))

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"dim={self.weight.shape[1]}, capacity={self.capacity}, weight={self.form}"


def _rational(capacity: float) -> tuple[int, int]:
    # 0.29 * 100 is 28.999… in floats, and integer arithmetic also serves symbolic sizes.
    share = Fraction(capacity).limit_denominator(10_000)
    return share.numerator, share.denominator


def weighted_update(before: Tensor, after: Tensor, weights: Tensor) -> Tensor:
    """Return ``before + w·(after − before)``, equal to ``after`` to the bit where w = 1.

    Args:
        before, after: ``[B, C, D]``.
        weights: w ``[B, C]``, at least float32.

    Returns:
        ``[B, C, D]`` in the dtype of ``after``.
    """
    return (after + (weights.unsqueeze(-1) - 1) * (after - before)).to(after.dtype)


def scale_tokens(values: Tensor, weights: Tensor) -> Tensor:
    """Return ``w·values`` for ``values`` ``[B, T, D]`` and weights ``[B, T]``, in the dtype of the values."""
    return (values * weights.unsqueeze(-1)).to(values.dtype)


def route_tokens(router: TokenRouter, x: Tensor, block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return ``x`` ``[B, T, D]`` with the selected tokens updated by ``block(x_sel, index) -> [B, C, D]``.

    ``x'_i = x_i + w_i · (f(x̃)_i − x_i)`` for the selected tokens, ``x'_i = x_i`` for the others, f the block with its
    own skip connection, run on the compacted tokens x̃ alone: skipped tokens are neither queries nor keys, unless f
    closes over x. Whatever else f needs per token is gathered with the index: `gather_tokens`, or `gather_rows` for
    tables that all samples share.
    """
    index, weights = router(x)
    if index.shape[1] == 0:
        return x
    chosen = gather_tokens(x, index)
    return put_tokens(x, index, weighted_update(chosen, block(chosen, index), weights.gather(1, index)))

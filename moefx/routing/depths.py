"""Mixture of depths: a block runs on the tokens that need it (arXiv 2404.02258).

Legend: B samples, T tokens, D width, C = ⌊capacity·T⌋ tokens that pass the block.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.select import top_k


class Selection(NamedTuple):
    """The tokens that pass: positions ``tokens`` [B, C], int64 ascending, and their r, ``weights`` [B, C], float32."""

    tokens: Tensor
    weights: Tensor


class TokenRouter(KeepFloat32):
    """Pass the C highest-scoring tokens of each sample through a block, leave the others as they are.

    ``x'_i = x_i + r_i · (f(x̃)_i − x_i)`` for the selected tokens, ``x'_i = x_i`` for the others, r_i = w·x_i + b, f the
    block with its own skip connection, run on the compacted tokens x̃ alone. r multiplies the block's *update*, is not
    squashed, and carries the router's gradient. C depends on T only, so shapes are static; selection is per sample, so
    a sample's result does not depend on its batch; the selected tokens keep their order.

    The bias b is moefx's choice of start (the paper has none): w = 0 and b = 1 give r = 1, so that with capacity 1 the
    block is the dense one to the bit. At capacity < 1 a zero w has only ties and selects the *first* C tokens of each
    sample: start such a router with ``std > 0``. Skipped tokens are neither queries nor keys inside f, which in
    bidirectional diffusion models is a change of function beyond the skipped updates; f receives the index and may
    attend to all of x if it closes over it.

    Args:
        dim: D.
        capacity: fraction of tokens that pass, 0 < capacity ≤ 1.
        bias: have b; False is the paper.
        std: standard deviation of w at the start.
        generator: source of w.
        device: as for any module.
    """

    # It runs the block that it is given, so a trace must go through it.
    calls_back = True

    def __init__(
        self,
        dim: int,
        capacity: float = 1.0,
        *,
        bias: bool = True,
        std: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise OptionError(
                f"mixture of depths with capacity {capacity}", found="out of range", do="0 < capacity <= 1"
            )
        self.capacity = capacity
        # In rationals: 0.29 * 100 is 28.999… in floats, and integer arithmetic also serves symbolic sizes.
        share = Fraction(capacity).limit_denominator(10_000)
        self._share = (share.numerator, share.denominator)
        draw = torch.randn(dim, generator=generator) * std if std else torch.zeros(dim)
        self.weight = nn.Parameter(draw.to(device))
        self.bias = nn.Parameter(torch.ones((), device=device)) if bias else None

    def tokens(self, total: int) -> int:
        """Return C for T = ``total``; an int, or a symbolic one for a symbolic total."""
        numerator, denominator = self._share
        return total * numerator // denominator

    def scores(self, x: Tensor) -> Tensor:
        """Return r ``[B, T]``, float32 (float64 for float64 input), of ``x`` ``[B, T, D]``."""
        with without_autocast(x):
            dtype = at_least_float32(x, self.weight)
            r = F.linear(x.to(dtype), self.weight.to(dtype).unsqueeze(0)).squeeze(-1)
            return r if self.bias is None else r + self.bias.to(dtype)

    def select(self, x: Tensor) -> Selection:
        """Return the C best tokens of each sample in ascending order; among equal scores the first tokens win."""
        r = self.scores(x)
        tokens = top_k(r.detach(), self.tokens(x.shape[1])).sort(dim=-1).values
        return Selection(tokens, r.gather(1, tokens))

    def forward(self, x: Tensor, block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return ``x`` ``[B, T, D]`` with the selected tokens updated by ``block(x_sel, index) -> [B, C, D]``.

        Whatever else the block needs per token is gathered with the index: `gather_tokens`, or `gather_rows` for tables
        that all samples share, such as rotary embeddings.
        """
        if self.tokens(x.shape[1]) == 0:
            return x
        index, r = self.select(x)
        chosen = gather_tokens(x, index)
        after = block(chosen, index)
        # after + (r − 1)(after − x) is x + r(after − x), and equal to `after` to the bit where r = 1.
        update = (after + (r.unsqueeze(-1) - 1) * (after - chosen)).to(x.dtype)
        return x.scatter(1, index.unsqueeze(-1).expand_as(update), update)

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"dim={self.weight.shape[0]}, capacity={self.capacity}"


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Return the selected tokens ``[B, C, ...]`` of per-sample values ``[B, T, ...]``; ``index`` is ``[B, C]``."""
    tail = values.shape[2:]
    where = index.reshape(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail)
    return values.gather(1, where)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return ``[B, C, ...]``: for each sample its selected rows of a table ``[T, ...]`` that all samples share."""
    return table[index]

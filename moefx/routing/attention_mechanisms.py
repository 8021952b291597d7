"""Ways to attend, each in the place of ``scaled_dot_product_attention``, and a router that picks one per head.

Legend: B samples, H heads, T tokens, d head width, M mechanisms, n image tokens.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx import ops
from moefx.errors import InputError, OptionError
from moefx.routing.attention_masks import TokenGrid, box, disc, with_others
from moefx.routing.attention_tiles import Tiling, attend_by_tiles, tile_sum
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.static import reads_tokens


class Attend(nn.Module):
    """Full attention over ``[B, H, T, d]``.

    Args:
        scale: of the scores; None for 1/√d.
        grouped: keys and values have fewer heads than queries.
    """

    def __init__(self, *, scale: float | None = None, grouped: bool = False) -> None:
        super().__init__()
        self.scale, self.grouped = scale, grouped

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``[B, H, T, d]``."""
        return self._attend(q, k, v, None)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=self.grouped)
        return y


class AttendLocally(Attend):
    """Attention of image tokens to those within reach, and to and from all other tokens.

    A disc ``Σ Δ² < radius²`` is CLEAR's (arXiv 2412.16112), a box ``|Δ| < radius`` along each axis a sliding window.
    A radius beyond the grid's diagonal is full attention. Where that saves a third of the products or more, tiles of
    the grid attend to the windows around them (`moefx.routing.attention_tiles`); else all scores are computed, and
    those outside the reach dropped.

    Args:
        grid: where the image is among the tokens.
        radius: nearer than this is seen.
        round_: a disc, else a box.
        edge: places of a tile along each axis; None for 8 on images and 4 on videos.
        scale: of the scores; None for 1/√d.
        grouped: keys and values have fewer heads than queries.
    """

    def __init__(
        self,
        grid: TokenGrid,
        radius: float,
        *,
        round_: bool = True,
        edge: int | None = None,
        scale: float | None = None,
        grouped: bool = False,
    ) -> None:
        super().__init__(scale=scale, grouped=grouped)
        if radius <= 0:
            raise OptionError(f"attend within {radius} tokens", found="nothing in reach", do="use a positive radius")
        self.grid, self.radius, self.round = grid, radius, round_
        self.edge = edge or (8 if len(grid.sizes) == 2 else 4)

    def mask(self, total: int, device: torch.device) -> Tensor:
        """Return ``[T, T]``, true where a query (row) sees a key (column)."""
        grid = self.grid.for_tokens(total)
        reach = [min(_below(self.radius), size) for size in grid.sizes]
        local = disc(grid.sizes, self.radius, device) if self.round else box(grid.sizes, reach, device)
        return with_others(local, grid.before, grid.after)

    def tiling(self, total: int) -> Tiling | None:
        """Return the tiles of an input of T = ``total`` tokens, or None where they save too little."""
        grid = self.grid.for_tokens(total)
        tiling = Tiling(grid.sizes, self.edge, _below(self.radius))
        places = math.prod(grid.sizes)
        return tiling if 3 * tiling.pairs <= 2 * places * places else None

    def seen(self, tiling: Tiling, device: torch.device) -> Tensor:
        """Return ``[N, Q, S]``, true where a query of a tile sees a key of its window."""
        apart = tiling.differences(device)
        if self.round:
            return tile_sum([difference.square() for difference in apart]) < self.radius * self.radius
        return tile_sum([(difference.abs() > tiling.reach).to(torch.int64) for difference in apart]) == 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``[B, H, T, d]``."""
        tiling = self.tiling(q.shape[-2])
        if tiling is None:
            return self._attend(q, k, v, self.mask(q.shape[-2], q.device))
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        before = self.grid.for_tokens(q.shape[-2]).before
        return attend_by_tiles(q, k, v, tiling, self.seen(tiling, q.device), before, self.scale)

    def extra_repr(self) -> str:
        """Describe the mechanism in ``print(model)``."""
        return f"{self.grid}, {'disc' if self.round else 'box'} of {self.radius}"


class AttendCoarsely(Attend):
    """Attention at low resolution: image tokens are averaged over buckets, attend, and share the result.

    Queries, keys and values of a bucket of ``bucket``^axes image tokens become their means; other tokens stay. After
    the attention every token has its bucket's result. A bucket of 1 is full attention. In place of VORTA's core set
    (arXiv 2505.18809), which keeps the tokens of a bucket that differ most from its centre, all are averaged.

    Buckets at the far end of an axis that the bucket does not divide are smaller.
    """

    def __init__(self, grid: TokenGrid, bucket: int, *, scale: float | None = None, grouped: bool = False) -> None:
        super().__init__(scale=scale, grouped=grouped)
        if bucket < 1:
            raise OptionError(f"average over buckets of {bucket}", found="no bucket", do="use at least 1")
        self.grid, self.bucket = grid, bucket

    def buckets(self, total: int, device: torch.device) -> tuple[Tensor, int]:
        """Return the bucket of each token ``[T]`` and the number of buckets; other tokens have one each."""
        grid = self.grid.for_tokens(total)
        index = torch.zeros((), dtype=torch.int64, device=device)
        count = 1
        for size in grid.sizes:
            coarse = -(-size // self.bucket)
            index = index[..., None] * coarse + torch.arange(size, device=device) // self.bucket
            count *= coarse
        others = torch.arange(grid.before + grid.after, device=device) + count
        return torch.cat([others[: grid.before], index.flatten(), others[grid.before :]]), count + len(others)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return ``[B, H, T, d]``."""
        bucket, count = self.buckets(q.shape[-2], q.device)
        sizes = torch.zeros(count, device=q.device).index_add(0, bucket, torch.ones_like(bucket, dtype=torch.float32))

        def mean(x: Tensor) -> Tensor:
            total = x.new_zeros(*x.shape[:-2], count, x.shape[-1]).index_add(-2, bucket, x)
            return total / sizes.to(x.dtype).unsqueeze(-1)

        return self._attend(mean(q), mean(k), mean(v), None).index_select(-2, bucket)

    def extra_repr(self) -> str:
        """Describe the mechanism in ``print(model)``."""
        return f"{self.grid}, buckets of {self.bucket}"


class RoutedAttention(KeepFloat32):
    """Let the timestep pick a mechanism for every head (VORTA, arXiv 2505.18809)::

        p = softmax over M of (W c(t) + b)          per head
        training:    y_h = Σ_m p_hm · A_m(q_h, k_h, v_h)
        evaluation:  y_h = A_m*(q_h, k_h, v_h)      m* = argmax p_h, but m* = 0 where max p_h < threshold

    Mechanism 0 is the fall-back, full attention. Every sample is routed by its own timestep; the released code lets the
    first one decide for the batch. In evaluation the choice carries the gradient of p (straight through). All
    mechanisms are computed and weighed, so that nothing waits for the router; on a CPU without gradients each runs for
    the samples and heads that picked it, and `moefx.specialise` leaves out the others where the timestep is known.

    Args:
        router: maps ``(x, timestep)`` to logits ``[B, 1, H·M]``, those of one head beside each other.
        mechanisms: M modules ``(q, k, v) → [B, H, T, d]``.
        num_heads: H.
        threshold: below it the fall-back serves.

    Attributes:
        record: statistics over the mechanisms; the term ``full`` is the mean of p_0² (coefficient 0.02 in the paper).
    """

    def __init__(
        self, router: nn.Module, mechanisms: Sequence[nn.Module], num_heads: int, *, threshold: float = 0.0
    ) -> None:
        super().__init__()
        self.router, self.mechanisms, self.num_heads = router, nn.ModuleList(mechanisms), num_heads
        self.threshold = threshold
        device = next(router.parameters()).device
        self.record = RoutingRecord(len(self.mechanisms), device=device, coefficients={"full": 0.02})

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the extra tensors the router reads."""
        return tuple(getattr(self.router, "taps", ()))

    def weights(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return what each mechanism counts in each head, ``[B, H, M]``, and record it."""
        logits = self.router(x, *taps)
        if logits.shape[-1] != self.num_heads * len(self.mechanisms):
            raise InputError(
                "route attention heads",
                found=f"logits {tuple(logits.shape)}",
                do=f"the router must return {len(self.mechanisms)} numbers for each of {self.num_heads} heads",
            )
        z = logits.to(at_least_float32(logits)).reshape(-1, self.num_heads, len(self.mechanisms))
        p: Tensor = z.softmax(-1)
        best, choice = p.detach().max(-1, keepdim=True)
        choice = torch.where(best < self.threshold, 0, choice)
        self.record.update(z.flatten(0, 1), choice.flatten(0, 1), "softmax_topk")
        self.record.add("full", mean_over_tokens(p[..., 0].square().flatten()))
        return p if self.training else torch.zeros_like(p).scatter(-1, choice, 1.0) + (p - p.detach())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[B, H, T, d]``."""
        weights = self.weights(q[:, 0], *taps)
        if not self.training and q.device.type == "cpu" and ops.unseen(q):
            return self._picked(q, k, v, weights.argmax(-1))
        total: Tensor | None = None
        for m, mechanism in enumerate(self.mechanisms):
            part = mechanism(q, k, v) * weights[..., m, None, None]
            total = part if total is None else total + part
        assert total is not None
        return total.to(q.dtype)

    def _picked(self, q: Tensor, k: Tensor, v: Tensor, picked_BH: Tensor) -> Tensor:
        """Run every mechanism for the samples and heads that picked it, as samples of one head."""
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        flat = [x.flatten(0, 1).unsqueeze(1) for x in (q, k, v)]
        picked = picked_BH.expand(q.shape[:2]).flatten()
        y = q.new_empty((len(picked), *q.shape[2:3], v.shape[-1]))
        for m, mechanism in enumerate(self.mechanisms):
            rows = (picked == m).nonzero().squeeze(1)
            if len(rows) == len(picked):
                whole: Tensor = mechanism(q, k, v)
                return whole
            if len(rows):
                y.index_copy_(0, rows, mechanism(*(x.index_select(0, rows) for x in flat)).squeeze(1))
        return y.view(*q.shape[:2], *y.shape[1:])

    @property
    def deciding(self) -> tuple[int, ...]:
        """Positions of the taps, if the router reads nothing else; see `moefx.routing.static`."""
        return () if reads_tokens(self.router) else tuple(range(3, 3 + len(self.taps)))

    @torch.no_grad()
    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the mechanism of each head for these values of the taps, and an attention that runs no other."""
        weights = self.weights(values[0].new_zeros((1, 1, 1)), *values)
        picked = tuple(weights[0].argmax(-1).tolist())
        return picked, shared.setdefault(picked, FoldedAttention(list(self.mechanisms), picked))

    def extra_repr(self) -> str:
        """Describe the routing in ``print(model)``."""
        return f"heads={self.num_heads}, threshold={self.threshold}"


class FoldedAttention(nn.Module):
    """Each head by the mechanism that was picked for it; heads of one mechanism attend together.

    Args:
        mechanisms: modules ``(q, k, v) → [B, h, T, d]``.
        picked: index of a mechanism per head.
    """

    # It is called with all that the routed attention was called with.
    same_arguments = True

    def __init__(self, mechanisms: Sequence[nn.Module], picked: Sequence[int]) -> None:
        super().__init__()
        used = sorted(set(picked))
        self.mechanisms = nn.ModuleList([mechanisms[m] for m in used])
        self.heads = [[h for h, m in enumerate(picked) if m == wanted] for wanted in used]
        order = [h for group in self.heads for h in group]
        self.back = [order.index(h) for h in range(len(picked))]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        """Return ``[B, H, T, d]``; what the router read is ignored."""
        if len(self.heads) == 1:
            y: Tensor = self.mechanisms[0](q, k, v)
            return y
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        parts = [m(q[:, h], k[:, h], v[:, h]) for m, h in zip(self.mechanisms, self.heads, strict=True)]
        return torch.cat(parts, dim=1)[:, self.back]

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"heads={self.heads}"


def _below(radius: float) -> int:
    """Return the largest whole distance less than ``radius``."""
    return int(-(-radius // 1)) - 1

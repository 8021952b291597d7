"""Local attention tile by tile: a tile of a grid of tokens attends to a window around it, not to the whole grid.

The windows of all tiles have one size: at the border a window is shifted inwards, and where a tile does not divide an
axis the last one is shifted too, so that some queries are computed twice and one of the two is taken. All sizes follow
from the grid and the reach.

Legend: B samples, H heads, n places of the grid, N tiles, Q queries of a tile, S keys of its window, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A grid of ``sizes`` cut into tiles of ``edge`` places along each axis, which see ``reach`` places further."""

    sizes: tuple[int, ...]
    edge: int
    reach: int

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key are computed; those of the whole grid are n²."""
        total = 1
        for size in self.sizes:
            edge, extent = self._widths(size)
            total *= -(-size // edge) * edge * extent
        return total

    def queries(self, device: torch.device) -> Tensor:
        """Return the places of each tile ``[N, Q]``."""
        return self._places([_runs(self._starts(size, device), self._widths(size)[0]) for size in self.sizes])

    def keys(self, device: torch.device) -> Tensor:
        """Return the places of each tile's window ``[N, S]``."""
        return self._places([self._window(size, device) for size in self.sizes])

    def home(self, device: torch.device) -> Tensor:
        """Return where each place is among all queries of all tiles ``[n]``."""
        tile = torch.zeros(1, dtype=torch.int64, device=device)
        within = tile
        for size in self.sizes:
            edge = self._widths(size)[0]
            place = torch.arange(size, device=device)
            own, starts = place // edge, self._starts(size, device)
            tile = (tile[:, None] * len(starts) + own).flatten()
            within = (within[:, None] * edge + (place - starts[own])).flatten()
        return tile * self.queries(device).shape[1] + within

    def differences(self, device: torch.device) -> list[Tensor]:
        """Return per axis how far its windows' places are from its tiles' ``[tiles, edge, extent]``."""
        return [
            self._window(size, device)[:, None, :]
            - _runs(self._starts(size, device), self._widths(size)[0])[:, :, None]
            for size in self.sizes
        ]

    def _widths(self, size: int) -> tuple[int, int]:
        edge = min(self.edge, size)
        return edge, min(size, edge + 2 * self.reach)

    def _starts(self, size: int, device: torch.device) -> Tensor:
        edge = self._widths(size)[0]
        return (torch.arange(-(-size // edge), device=device) * edge).clamp(max=size - edge)

    def _window(self, size: int, device: torch.device) -> Tensor:
        extent = self._widths(size)[1]
        return _runs((self._starts(size, device) - self.reach).clamp(0, size - extent), extent)

    def _places(self, parts: list[Tensor]) -> Tensor:
        """Return flat places ``[N, ·]`` from those along each axis ``[tiles, ·]``."""
        total = parts[0]
        for part, size in zip(parts[1:], self.sizes[1:], strict=True):
            total = (total[:, None, :, None] * size + part[None, :, None, :]).reshape(total.shape[0] * len(part), -1)
        return total


def tile_sum(parts: Sequence[Tensor]) -> Tensor:
    """Return ``[N, Q, S]``: the sum over the axes of what each contributes, ``[tiles, edge, extent]``."""
    total = parts[0]
    for part in parts[1:]:
        sums = total[:, None, :, None, :, None] + part[None, :, None, :, None, :]
        total = sums.reshape(total.shape[0] * part.shape[0], total.shape[1] * part.shape[1], -1)
    return total


def attend_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, seen_NQS: Tensor, before: int, scale: float | None
) -> Tensor:
    """Return ``[B, H, T, d]``: the grid's tokens see their window and all other tokens; those see everything.

    Args:
        q, k, v: ``[B, H, T, d]``, with one key and value head per query head.
        tiling: of the grid's tokens, which follow each other.
        seen_NQS: which keys of its window a query sees.
        before: tokens before those of the grid.
        scale: of the scores; None for 1/√d.
    """
    batch, heads, total, _ = q.shape
    home = tiling.home(q.device)
    split = [before, len(home), total - before - len(home)]
    (q0, qi, q1), (k0, ki, k1), (v0, vi, v1) = (torch.split_with_sizes(x, split, dim=2) for x in (q, k, v))
    tiles, windows = tiling.queries(q.device), tiling.keys(q.device)

    def cut(x: Tensor, index: Tensor, *others: Tensor) -> Tensor:
        own = x.index_select(2, index.flatten()).reshape(batch * heads, *index.shape, x.shape[3])
        rest = [
            o.reshape(batch * heads, 1, o.shape[2], o.shape[3]).expand(-1, len(index), -1, -1)
            for o in others
            if o.shape[2]
        ]
        return torch.cat([own, *rest], dim=2) if rest else own

    mask = F.pad(seen_NQS, (0, total - len(home)), value=True).unsqueeze(0)
    y = F.scaled_dot_product_attention(
        cut(qi, tiles), cut(ki, windows, k0, k1), cut(vi, windows, v0, v1), attn_mask=mask, scale=scale
    )
    y = y.reshape(batch, heads, tiles.numel(), y.shape[3]).index_select(2, home)
    if total == len(home):
        return y
    rest = F.scaled_dot_product_attention(torch.cat([q0, q1], dim=2), k, v, scale=scale)
    return torch.cat([rest[:, :, :before], y, rest[:, :, before:]], dim=2)


def _runs(starts: Tensor, length: int) -> Tensor:
    return starts[:, None] + torch.arange(length, device=starts.device)

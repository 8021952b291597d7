"""Routing for several blocks at once: dropped tokens, pooled tokens, and which of the blocks run.

Legend: B samples, T tokens, D width, C tokens that stay, S sparse tokens, m blocks of a group, κ of them that run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.record import RoutingRecord
from moefx.routing.skip import within_capacity
from moefx.routing.tokens import Joint


class TokenDrop(nn.Module):
    """Choose at random which tokens go through a segment in training; all of them otherwise (TREAD, arXiv 2501.04765).

    Args:
        share: fraction of the tokens that go through, 0 < share ≤ 1.
        per_sample: draw for every sample; else once for the batch, which tables by position may need.
    """

    def __init__(self, share: float = 0.5, *, per_sample: bool = True) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise OptionError(f"let {share} of the tokens through", found="out of range", do="0 < share <= 1")
        self.share, self.per_sample = share, per_sample

    def forward(self, x: Tensor) -> Tensor:
        """Return ascending positions ``[B, C]`` for ``[B, T, D]``: C = max(1, ⌊share·T⌋) in training, T otherwise."""
        samples, total = x.shape[0], x.shape[1]
        if not self.training:
            return torch.arange(total, device=x.device).expand(samples, total)
        count = max(1, int(self.share * total))
        draw = torch.rand((samples if self.per_sample else 1, total), device=x.device)
        return draw.argsort(dim=-1)[:, :count].sort(dim=-1).values.expand(samples, count)

    def extra_repr(self) -> str:
        """Describe the choice in ``print(model)``."""
        return f"share={self.share}, per_sample={self.per_sample}"


def follow_shared(values: Tensor, index: Tensor, x: Tensor, axes: tuple[int, ...], joint: Joint = "") -> Tensor:
    """Return ``values`` for the selected tokens, which are the same in all samples, whatever its other axes are.

    Args:
        values: any shape, with T entries on ``axes`` (from the back), or T and those of other tokens (``joint``).
        index: ``[B, C]`` with equal rows.
        x: ``[B, T, D]``, the sequence before the selection.
        axes: as in `routing.follow`.
        joint: as in `routing.follow`.
    """
    rows, total = index[0], x.shape[1]
    for axis in axes:
        others = values.shape[axis] - total
        where = rows
        if joint:
            kept = torch.arange(others, device=rows.device)
            where = torch.cat([rows, kept + total]) if joint == "first" else torch.cat([kept, rows + others])
        values = values.index_select(axis, where)
    return values


class SparseTokens(nn.Module):
    """Pool the tokens of a grid to fewer, and recover the full grid from them (SparseDiT, arXiv 2412.06028).

    ``s = pool(x)`` averages cells of the √T·√T grid; ``y = W₁·up(s) + W₂·x`` with nearest upsampling recovers it. The
    start is W₁ = 0 and W₂ = I: the full stream as it was before the segment.

    Args:
        dim: D.
        side: √S.
        device: as for any module.
    """

    def __init__(self, dim: int, side: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if side < 1:
            raise OptionError(f"pool to a side of {side}", found="no token", do="side >= 1")
        self.side = side
        self.from_sparse = nn.Linear(dim, dim, device=device)
        self.from_full = nn.Linear(dim, dim, bias=False, device=device)
        with torch.no_grad():
            for parameter in self.from_sparse.parameters():
                parameter.zero_()
            nn.init.eye_(self.from_full.weight)

    def forward(self, x: Tensor, sparse: Tensor | None = None) -> Tensor:
        """Return the sparse tokens ``[B, S, D]`` of ``x`` ``[B, T, D]``; given them, the full ones ``[B, T, D]``."""
        grid = _side(x.shape[1])
        if sparse is None:
            image = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], grid, grid)
            return F.adaptive_avg_pool2d(image, self.side).flatten(2).transpose(1, 2)
        small = sparse.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.side, self.side)
        up = F.interpolate(small, size=(grid, grid), mode="nearest").flatten(2).transpose(1, 2)
        y: Tensor = self.from_sparse(up) + self.from_full(x)
        return y


def _side(total: int) -> int:
    side = int(total**0.5 + 0.5)  # isqrt() takes no symbolic number of tokens
    if side * side != total:
        raise InputError("pool tokens of a square grid", found=f"{total} tokens", do="use square images")
    return side


class BlockChoice(KeepFloat32):
    """Choose κ adjacent ones of m blocks for each sample (mixture of blocks of Dense2MoE, arXiv 2510.09094).

    ``score = α·W_x [mean(x); mean(c)] + (1 − α)·W_y y`` over the m − κ + 1 windows, c the text tokens and y the global
    embedding, each if there is one. The block's gate is 1 inside the best window and 0 outside, with the gradient of
    the probability that the window contains it (straight through).

    With a capacity a block takes at most ``⌈capacity · B⌉`` samples of a batch, those most likely to want it; the
    others pass it by, as if it were outside their window. Shapes then depend on the batch size alone.

    Args:
        blocks: m.
        active: κ.
        dims: widths of x and, where there are some, of the text tokens.
        condition_dim: width of y; 0 for none.
        mix: α.
        std: standard deviation of W_x and W_y at the start.
        capacity: most samples that a block takes, as a fraction of the batch; None for all that want it.
        generator: their source.
        device: as for any module.
    """

    def __init__(
        self,
        blocks: int,
        active: int,
        dims: tuple[int, ...],
        *,
        condition_dim: int = 0,
        mix: float = 0.5,
        std: float = 0.02,
        capacity: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= active <= blocks or (capacity is not None and not 0 < capacity <= 1):
            raise OptionError(
                f"run {active} of {blocks} blocks at capacity {capacity}",
                found="out of range",
                do="1 <= active <= blocks, 0 < capacity <= 1",
            )
        self.blocks, self.active, self.mix, self.streams = blocks, active, mix, len(dims)
        self.capacity = capacity
        windows = blocks - active + 1

        def normal(columns: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(windows, columns, generator=generator) * std).to(device))

        self.weight = normal(sum(dims))
        self.condition_weight = normal(condition_dim) if condition_dim else None
        self.record = RoutingRecord(windows, device=device, coefficients={"balance": 0.01})

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the gates ``[B, m]`` from the streams ``[B, T, D]`` and y ``[B, D_c]`` if it has a width."""
        with without_autocast(inputs[0]):
            dtype = at_least_float32(inputs[0], self.weight)
            pooled = torch.cat([mean_over_tokens(x.to(dtype), 1) for x in inputs[: self.streams]], dim=-1)
            scores = F.linear(pooled, self.weight.to(dtype))
            if self.condition_weight is not None:
                given = F.linear(inputs[self.streams].to(dtype), self.condition_weight.to(dtype))
                scores = self.mix * scores + (1 - self.mix) * given
            best = scores.argmax(-1, keepdim=True)
            self.record.update(scores, best, "softmax_topk")
            soft = self._contain(scores.softmax(-1))
            hard = self._contain(torch.zeros_like(scores).scatter(-1, best, 1.0))
            if self.capacity is not None:
                hard = within_capacity(hard, soft.detach(), self.capacity)
            return hard + (soft - soft.detach())

    def _contain(self, windows: Tensor) -> Tensor:
        """Return, per block, the sum over the windows ``[B, m − κ + 1]`` that contain it."""
        starts = torch.arange(windows.shape[-1], device=windows.device).unsqueeze(1)
        blocks = torch.arange(self.blocks, device=windows.device)
        inside = (blocks >= starts) & (blocks < starts + self.active)
        return windows @ inside.to(windows.dtype)

    def extra_repr(self) -> str:
        """Describe the choice in ``print(model)``."""
        return f"blocks={self.blocks}, active={self.active}"


def gate_block(before: Tensor, after: Tensor, gates: Tensor, block: int) -> Tensor:
    """Return ``after`` where the gate of a block is 1 and ``before`` where it is 0, with the gradient of the gate.

    Args:
        before, after: ``[B, T, D]``.
        gates: ``[B, m]``.
        block: which column.
    """
    g = gates[:, block].reshape(-1, 1, 1)
    return torch.where(g > 0.5, after + (g - 1) * (after - before), before + g * (after - before)).to(after.dtype)

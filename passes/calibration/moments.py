"""Counts, means and squared deviations that can be merged in any order.

Legend: G groups (noise level and branch), N rows, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Mean and summed squared deviation per group and feature, in float64 on the CPU.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979): the
    merge of two parts is that of their union, without the cancellation of Σx² − (Σx)²/n.

    Attributes:
        count: ``[G]``.
        mean: ``[G, F]``.
        squares: ``[G, F]``, Σ (x − mean)².
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    @staticmethod
    def empty(groups: int, features: int) -> Moments:
        """Return the moments of nothing."""
        zeros = torch.zeros(groups, features, dtype=torch.float64)
        return Moments(torch.zeros(groups, dtype=torch.float64), zeros, zeros.clone())

    @staticmethod
    def of(x_NF: Tensor, group_N: Tensor, groups: int) -> Moments:
        """Return the moments of rows, computed where they lie and brought to the CPU at the end."""
        wide = x_NF.detach().to(torch.float64)
        count = torch.bincount(group_N, minlength=groups).to(wide.dtype)
        mean = _sums(wide, group_N, groups) / count.clamp(min=1).unsqueeze(1)
        squares = _sums((wide - mean[group_N]).square(), group_N, groups)
        return Moments(count.cpu(), mean.cpu(), squares.cpu())

    def merged(self, other: Moments) -> Moments:
        """Return the moments of both parts together."""
        count = self.count + other.count
        share = (other.count / count.clamp(min=1)).unsqueeze(1)
        delta = other.mean - self.mean
        between = delta.square() * (self.count.unsqueeze(1) * share)
        return Moments(count, self.mean + delta * share, self.squares + other.squares + between)

    def pooled(self) -> Moments:
        """Return the moments of all groups together, as one group."""
        total = Moments.empty(1, self.mean.shape[1])
        for g in range(len(self.count)):
            total = total.merged(Moments(self.count[g : g + 1], self.mean[g : g + 1], self.squares[g : g + 1]))
        return total

    @property
    def variance(self) -> Tensor:
        """Population variance ``[G, F]``; 0 where nothing was counted."""
        return self.squares / self.count.clamp(min=1).unsqueeze(1)

    @property
    def second(self) -> Tensor:
        """E[x²] ``[G, F]``."""
        return self.variance + self.mean.square()


def _sums(x_NF: Tensor, group_N: Tensor, groups: int) -> Tensor:
    return x_NF.new_zeros(groups, x_NF.shape[1]).index_add_(0, group_N, x_NF)

"""Local attention on a grid of image tokens, with text tokens that attend to all and are attended to by all.

Legend: T tokens of a sample, n image tokens among them, row by row (and frame by frame) as patches are cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefx.errors import InputError


@dataclass(frozen=True)
class TokenGrid:
    """Where the image is among the tokens: ``before`` other tokens, an image of ``sizes``, ``after`` other tokens.

    ``sizes`` is (height, width) or (frames, height, width), in tokens.
    """

    before: int
    after: int
    sizes: tuple[int, ...]

    def for_tokens(self, total: int) -> TokenGrid:
        """Return the grid of an input of T = ``total`` tokens: this one, or one of the same proportions.

        Raises:
            InputError: no grid of these proportions has so many tokens, or it cannot be told how many are text.
        """
        count = total - self.before - self.after
        if count == math.prod(self.sizes):
            return self
        scaled = self._scaled(count) if self.before + self.after == 0 else None
        if scaled is None:
            raise InputError(
                f"attend locally among {total} tokens",
                found=f"planned for {self.before} + {' x '.join(map(str, self.sizes))} + {self.after}",
                do="transform the model with example inputs of this size",
            )
        return TokenGrid(0, 0, scaled)

    def _scaled(self, count: int) -> tuple[int, ...] | None:
        """Return a grid of ``count`` tokens with the frames and the proportions of this one; None if there is none."""
        *frames, height, width = self.sizes
        shrunk = math.gcd(height, width)
        unit = math.prod(frames) * (height // shrunk) * (width // shrunk)
        side = math.isqrt(max(count, 0) // unit)
        found = side > 0 and side * side * unit == count
        return (*frames, height // shrunk * side, width // shrunk * side) if found else None


def disc(sizes: Sequence[int], radius: float, device: torch.device | None = None) -> Tensor:
    """Return ``[n, n]``, true where two places are less than ``radius`` apart: Σ Δ² < r² (CLEAR, arXiv 2412.16112)."""
    squares = [difference.square() for difference in _differences(sizes, device)]
    return _outer_sum(squares) < radius * radius


def box(sizes: Sequence[int], reach: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Return ``[n, n]``, true where two places are at most ``reach`` apart along every axis: a sliding window."""
    outside = [(d.abs() > far).to(torch.int64) for d, far in zip(_differences(sizes, device), reach, strict=True)]
    return _outer_sum(outside) == 0


def with_others(local: Tensor, before: int, after: int) -> Tensor:
    """Return the mask ``[T, T]`` of all tokens: other tokens see all and are seen by all."""
    mask = torch.ones(
        before + local.shape[0] + after, before + local.shape[0] + after, dtype=torch.bool, device=local.device
    )
    mask[before : before + local.shape[0], before : before + local.shape[0]] = local
    return mask


def _differences(sizes: Sequence[int], device: torch.device | None) -> list[Tensor]:
    """Return per axis the differences ``[s, s]`` between its places."""
    places = [torch.arange(size, device=device) for size in sizes]
    return [place[:, None] - place[None, :] for place in places]


def _outer_sum(parts: list[Tensor]) -> Tensor:
    """Return ``[n, n]``: the sum over the axes of what each contributes to two places."""
    total = parts[0]
    for part in parts[1:]:
        pairs = total[:, None, :, None] + part[None, :, None, :]
        total = pairs.reshape(total.shape[0] * part.shape[0], -1)
    return total

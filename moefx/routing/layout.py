"""Routing where the features are not the last dimension, as after a 1x1 convolution."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn


class OnAxis(nn.Module):
    """Apply ``inner`` to features that lie along dimension ``axis``: every other position is a token.

    Args:
        inner: maps ``[B, ..., D]`` to ``[B, ..., D_o]``.
        axis: the dimension of the features, such as 1 for images ``[B, D, H, W]``.
    """

    def __init__(self, inner: nn.Module, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(self, x: Tensor, *taps: Tensor) -> Any:
        """Map ``[B, ..., D, ...]`` to ``[B, ..., D_o, ...]``; the state of a router with memory is passed through."""
        y: Any = self.inner(x.movedim(self.axis, -1), *taps)
        return (y[0].movedim(-1, self.axis), y[1]) if isinstance(y, tuple) else y.movedim(-1, self.axis)

    @property
    def deciding(self) -> tuple[int, ...]:
        """Those of ``inner``; see `moefx.routing.static`."""
        return tuple(getattr(self.inner, "deciding", ()))

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Fold ``inner``."""
        choice, static = self.inner.fold(values, shared)  # type: ignore[operator]
        return choice, OnAxis(static, self.axis)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"axis={self.axis}"

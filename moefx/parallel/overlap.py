"""Shared experts that run while the rows of the routed ones travel.

A routed FFN calls its experts first and its shared expert after them. So the experts, once their rows are on the way,
compute the shared expert's result, and the shared expert hands it out when it is called. Its class is replaced by a
subclass for that; names of parameters, hooks and everything else stay.

Legend: T tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moefx.routing.moe import RoutedFFN

_PENDING = "_moefx_pending"
_made: dict[Any, type[nn.Module]] = {}


def prepare(layer: RoutedFFN) -> nn.Module | None:
    """Let the shared expert of a layer be computed ahead, and return it; None if there is none."""
    if layer.shared is not None:
        layer.shared.__class__ = _ahead(type(layer.shared))
    return layer.shared


def compute_ahead(shared: nn.Module, x_TD: Tensor) -> None:
    """Compute what the next call of ``shared`` returns."""
    shared.__dict__[_PENDING] = type(shared).__mro__[1].forward(shared, x_TD)  # type: ignore[attr-defined]


def _ahead(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass whose forward hands out what is pending; one per class."""
    if cls not in _made:
        _made[cls] = _make(cls)
    return _made[cls]


def _make(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        pending: Tensor | None = self.__dict__.pop(_PENDING, None)
        if pending is None:
            found: Tensor = cls.forward(self, x)
            return found
        return pending.reshape(*x.shape[:-1], pending.shape[-1])

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__})

"""Pointwise functions between the two projections of an FFN.

A plain FFN has ``act(up)``, a gated one the general two-argument form ``act(up, gate)``. Anything pointwise will do, a
function or an ``nn.Module``; these are the usual ones by name, so that a plan can be written down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError, nearest


def squared_relu(x: Tensor) -> Tensor:
    """Return ``relu(x)²``."""
    return F.relu(x).square()


def identity(x: Tensor) -> Tensor:
    """Return ``x``."""
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": identity,
    "relu": F.relu,
    "relu2": squared_relu,
    "sigmoid": F.sigmoid,
    "silu": F.silu,
}


class Gated(nn.Module):
    """The product form ``act(gate) · up`` of GEGLU, SwiGLU, ReGLU and GLU, as a two-argument activation."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, up: Tensor, gate: Tensor) -> Tensor:
        """Return ``act(gate) · up``; both ``[..., F]``."""
        return self.act(gate) * up


def activation(name: str, *, gated: bool = False) -> Callable[..., Any]:
    """Return the activation of that name: one argument, or with ``gated`` two.

    Raises:
        OptionError: no activation of that name.
    """
    if name not in ACTIVATIONS:
        raise OptionError(f"activation {name!r}", found="no activation of that name", do=nearest(name, ACTIVATIONS))
    return Gated(ACTIVATIONS[name]) if gated else ACTIVATIONS[name]

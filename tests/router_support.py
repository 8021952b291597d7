"""Graphs of routers for tests of their kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx


def traced(function: Callable[..., object], *inputs: Tensor | None) -> fx.GraphModule:
    """Return the ATen graph of a function, with values recorded, and with no constants instead of missing inputs."""
    with torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*inputs)

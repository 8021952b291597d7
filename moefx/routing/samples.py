"""Routing whole samples, for networks that mix tokens inside, such as one with a depthwise convolution.

Legend: B samples, D features, E experts, K experts per sample.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from moefx.errors import OptionError
from moefx.routing.losses import mean_over_tokens
from moefx.routing.moe import RoutedFFN


class ModuleExperts(nn.Module):
    """E copies of one module as stacked parameters ``[E, ...]`` under the module's own names.

    Every sample runs through the module with its own experts' parameters, gathered per sample: the cost is K dense
    passes and B·K gathered parameter sets. Shapes do not depend on the routing.

    Args:
        module: maps ``[B, ...]`` to ``[B, ...]``, sample by sample; its buffers are shared by the experts.
        num_experts: E.
    """

    def __init__(self, module: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.stacked = copy.deepcopy(module)
        for name, parameter in module.named_parameters():
            path, _, key = name.rpartition(".")
            owner = self.stacked.get_submodule(path)
            owner._parameters[key] = nn.Parameter(torch.stack([parameter.detach()] * num_experts))

    def forward(self, x: Tensor, experts_BK: Tensor, gates_BK: Tensor) -> Tensor:
        """Return ``Σ_j gates[b, j] · module(x_b; parameters of experts[b, j])``, accumulated in at least float32."""

        def one(parameters: dict[str, Tensor], sample: Tensor) -> Any:
            return functional_call(self.stacked, parameters, (sample.unsqueeze(0),)).squeeze(0)

        total: Tensor | None = None
        for j in range(experts_BK.shape[1]):
            chosen = {name: p.index_select(0, experts_BK[:, j]) for name, p in self.stacked.named_parameters()}
            y = vmap(one)(chosen, x)
            part = y * gates_BK[:, j].reshape(-1, *[1] * (y.ndim - 1))
            total = part if total is None else total + part
        assert total is not None
        return total.to(x.dtype)

    def extra_repr(self) -> str:
        """Describe the experts in ``print(model)``."""
        return f"num_experts={self.num_experts}"


class RoutedSamples(RoutedFFN):
    """A routed network whose router decides once per sample, from the mean over its positions.

    Exact on copies as :class:`RoutedFFN` is. ``axis`` is the dimension of the features.
    """

    def __init__(self, router: nn.Module, experts: ModuleExperts, *, axis: int, **options: Any) -> None:
        if options.get("granularity", 1) != 1 or options.get("shared") is not None:
            raise OptionError(
                "route whole samples", found="granularity or a shared expert", do="use granularity=1 and shared=0"
            )
        super().__init__(router, experts, **options)
        self.axis = axis

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, ...]`` to ``[B, ...]``."""
        pooled_B1D = mean_over_tokens(x.movedim(self.axis, -1).flatten(1, -2), 1).unsqueeze(1)
        routing = self.route(pooled_B1D, *taps)
        y: Tensor = self.experts(x, routing.experts, routing.gates)
        return y

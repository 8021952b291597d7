"""Graphs of routers for tests of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from moefx import ops
from moefx.codegen import lowerings
from moefx.codegen.kernels.router import RouterSpec
from moefx.codegen.router_lowering import RouterLowering
from moefx.routing.normalise import normalise, selection_scores
from moefx.routing.select import group_limited_top_k, top_k


def renormalised(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Choose by softmax and a bias, and renormalise: DeepSeek-V3's scheme with softmax."""
    logits = F.linear(x.to(torch.float32), weight)
    experts = top_k(logits.detach().softmax(-1) + bias, min(8, weight.shape[0]))
    gates = logits.gather(-1, experts).softmax(-1)
    ops.group(experts.reshape(-1, experts.shape[-1]), weight.shape[0])
    return experts, gates


def traced(function: Callable[..., object], *inputs: Tensor | None) -> fx.GraphModule:
    """Return the ATen graph of a function, with values recorded, and with no constants instead of missing inputs."""
    with torch.no_grad():
        return make_fx(function, pre_dispatch=True)(*inputs)


def within_groups(groups: int, keep: int, best: int, k: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return DeepSeek-V3's router: scores with a bias, the best groups, the best experts of those."""

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.to(torch.promote_types(weight.dtype, torch.float32)), weight)
        scores = selection_scores(logits.detach(), "sigmoid_topk_renorm", bias)
        experts = group_limited_top_k(scores, k, groups=groups, keep=keep, best=best)
        ops.group(experts.reshape(-1, k), weight.shape[0])
        return experts, normalise(logits, experts, "sigmoid_topk_renorm", scale=2.5)

    return run


def standard_router(experts: int, dtype: torch.dtype, function: Callable[..., object] = renormalised) -> RouterSpec:
    """Return the kernel of a router over tokens of DiT-XL/2's width."""
    tokens = torch.zeros(3, 5, 1152, dtype=dtype)
    graph = traced(function, tokens, torch.zeros(experts, 1152), torch.zeros(experts))
    return next(item.spec for item in lowerings(graph) if isinstance(item, RouterLowering))


class Recorder(TorchDispatchMode):
    """Note every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def waiting(self) -> set[str]:
        """Those that wait for a number from the device."""
        known = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount"}
        return self.names & known

"""One class per kind of stacked experts, each in place of the experts of a layer: the same call, the same sum.

Legend: T tokens of this rank, B samples, K experts per token or sample, R rows (T·K), A rows that arrive here, E
experts, D width, r rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from moefx import ops
from moefx.parallel.dispatch import Weights
from moefx.parallel.divided import DividedExperts, flat_rows, take
from moefx.parallel.roster import Roster
from moefx.passes.placement.stacks import stacked_parameters
from moefx.routing.experts import Experts
from moefx.routing.low_rank import LowRankExperts
from moefx.routing.masks import LinearExperts
from moefx.routing.samples import ModuleExperts


class ParallelExperts(DividedExperts, Experts):
    """Feed-forward experts, divided.

    Args:
        experts: all E experts; their tensors are left as they are.
        roster: who holds what.
        rank: this one.
        group: name of the process group of the G ranks.
        options: of :meth:`DividedExperts.divide`.
    """

    # Experts that choose their tokens would see those of this rank alone: their choice goes by tokens.
    by_expert = None  # type: ignore[assignment]

    def __init__(self, experts: Experts, roster: Roster, rank: int, group: str, **options: Any) -> None:
        mine = roster.homes[rank]
        Experts.__init__(self, replace(experts.weights(), b_out=None).map(lambda t: take(t, mine)), experts.act)
        self.b_out, self.num_experts = experts.b_out, experts.num_experts
        _like(self, experts)
        self.divide(roster, rank, group, experts.w_in.device, **options)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts, wherever they are; see :meth:`Experts.forward`."""
        y_TD = self.sum_over_experts(self.held(), self._rows, x_TD, experts_TK, gates_TK)
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    def _rows(self, weights: Weights, x: Tensor, order: Tensor, offsets: Tensor, k: int) -> Tensor:
        h = ops.grouped_linear(x, weights["w_in"], weights.get("b_in"), order, offsets, k)
        if "w_gate" not in weights:
            h = self.act(h)
        else:
            h = self.act(h, ops.grouped_linear(x, weights["w_gate"], weights.get("b_gate"), order, offsets, k))
        return ops.grouped_linear(h, weights["w_out"], None, None, offsets)


class ParallelLinear(DividedExperts, LinearExperts):
    """Linear maps, divided."""

    def __init__(self, experts: LinearExperts, roster: Roster, rank: int, group: str, **options: Any) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        for name, parameter in stacked_parameters(experts).items():
            self.register_parameter(name, nn.Parameter(take(parameter, roster.homes[rank])))
        _like(self, experts)
        self.divide(roster, rank, group, experts.weight.device, **options)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum; see :meth:`LinearExperts.forward`."""

        def rows(weights: Weights, x: Tensor, order: Tensor, offsets: Tensor, k: int) -> Tensor:
            return ops.grouped_linear(x, weights["weight"], weights["bias"], order, offsets, k)

        return self.sum_over_experts(self.held(), rows, x_TD, experts_TK, gates_TK)


class ParallelLowRank(DividedExperts, LowRankExperts):
    """Low-rank deltas, divided; the dense FFN below them is kept and computed by every rank for its own tokens.

    Deltas before the activation and after it need a way there and back each: their sum passes the activation.
    """

    overlaps = False

    def __init__(self, experts: LowRankExperts, roster: Roster, rank: int, group: str, **options: Any) -> None:
        nn.Module.__init__(self)
        self.dense, self.num_experts = experts.dense, experts.num_experts
        self.scaling, self.ungated = experts.scaling, experts.ungated
        for name, parameter in experts._parameters.items():
            mine = None if parameter is None else nn.Parameter(take(parameter, roster.homes[rank]))
            self.register_parameter(name, mine)
        _like(self, experts)
        self.divide(roster, rank, group, experts.dense.w_in.device, **options)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``[T, D_o]``; see :meth:`LowRankExperts.forward`."""
        gates_TK = torch.where(experts_TK < self.ungated, 1.0, gates_TK) * self.scaling
        weights, d = self.held(), self.dense

        def deltas(x: Tensor, *names: str) -> dict[str, Tensor]:
            names = tuple(name for name in names if f"a_{name}" in weights)
            if not names:
                return {}
            y = self.sum_over_experts(weights, _low_rank_rows(names), x, experts_TK, gates_TK)
            widths = [weights[f"b_{name}"].shape[1] for name in names]
            return dict(zip(names, torch.split(y, widths, dim=1), strict=True))

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor | None) -> Tensor:
            y = nn.functional.linear(x, weight, bias)
            return y if delta is None else y + delta.to(y.dtype)

        first = deltas(x_TD, "in", "gate")
        up = linear(x_TD, d.w_in, d.b_in, first.get("in"))
        h = d.act(up) if d.w_gate is None else d.act(up, linear(x_TD, d.w_gate, d.b_gate, first.get("gate")))
        return linear(h, d.w_out, d.b_out, deltas(h, "out").get("out"))

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"experts {list(self.local_experts)} of {self.num_experts}, scaling={self.scaling}"


def _low_rank_rows(names: tuple[str, ...]) -> Callable[..., Tensor]:
    """Return the function that gives ``B_e A_e x`` of these maps, beside each other."""

    def rows(weights: Weights, x: Tensor, order: Tensor, offsets: Tensor, k: int) -> Tensor:
        found = []
        for name in names:
            low = ops.grouped_linear(x, weights[f"a_{name}"], None, order, offsets, k)
            found.append(ops.grouped_linear(low, weights[f"b_{name}"], None, None, offsets))
        return torch.cat(found, dim=1)

    return rows


class ParallelModules(DividedExperts, ModuleExperts):
    """Whole modules, divided; samples travel. All ranks' samples must have the same shape."""

    overlaps = False

    def __init__(self, experts: ModuleExperts, roster: Roster, rank: int, group: str, **options: Any) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        # Parameters are replaced while the module is copied, so that no second copy of all experts is made.
        mine = {id(p): nn.Parameter(take(p, roster.homes[rank])) for p in experts.stacked.parameters()}
        self.stacked = copy.deepcopy(experts.stacked, mine)
        _like(self, experts)
        self.divide(roster, rank, group, next(experts.parameters()).device, **options)

    def forward(self, x: Tensor, experts_BK: Tensor, gates_BK: Tensor) -> Tensor:
        """Return the weighted sum; see :meth:`ModuleExperts.forward`."""
        body = _Samples(self.stacked, x.shape[1:])
        y_BN = self.sum_over_experts(self.held(), body, x.reshape(len(x), -1), experts_BK, gates_BK)
        return y_BN.reshape(len(x), *body.shape_out).to(x.dtype)


class _Samples:
    """What experts that are modules make of samples that travel as rows.

    Args:
        module: with any parameters; those of each row's expert take their place.
        shape: of one sample.
    """

    def __init__(self, module: nn.Module, shape: torch.Size) -> None:
        self.module, self.shape, self.shape_out = module, shape, shape

    def __call__(self, weights: Weights, x: Tensor, order: Tensor, offsets: Tensor, k: int) -> Tensor:
        """Return the outputs, flat; a sample of zeros is added where there is none, since modules need one."""
        count = int(offsets[-1])  # the splits of the exchange were waited for: this does not wait again
        index = torch.arange(max(count, 1), device=x.device)
        expert_R = torch.searchsorted(offsets[1:], index, right=True).clamp(max=len(offsets) - 2)
        rows = x.index_select(0, order[:count] // k) if count else torch.cat([x, x.new_zeros((1, x.shape[1]))])[-1:]

        def one(parameters: dict[str, Tensor], sample: Tensor) -> Any:
            return functional_call(self.module, parameters, (sample.unsqueeze(0),)).squeeze(0)

        chosen = {name.removeprefix("stacked."): w.index_select(0, expert_R) for name, w in weights.items()}
        y = vmap(one)(chosen, rows.view(-1, *self.shape))
        self.shape_out = y.shape[1:]
        empty = y.new_zeros((len(order) - count, y[0].numel()))
        return torch.cat([flat_rows(y)[:count], empty])


KINDS: dict[type[nn.Module], Callable[..., DividedExperts]] = {
    Experts: ParallelExperts,
    LinearExperts: ParallelLinear,
    LowRankExperts: ParallelLowRank,
    ModuleExperts: ParallelModules,
}


def _like(divided: DividedExperts, experts: nn.Module) -> None:
    """Take over what is to be trained, and the mode."""
    for name, parameter in experts.named_parameters():
        divided.get_parameter(name).requires_grad_(parameter.requires_grad)
    divided.training = experts.training

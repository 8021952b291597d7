"""Experts of which each process holds some; tokens travel to them and back.

Legend: T tokens of this rank, K experts per token, R = T·K rows, E experts, G ranks, D width, A rows that arrive here.
A *slot* is the position of an expert when experts are sorted by rank, then by number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_true

from moefx import ops
from moefx.parallel.exchange import Splits, exchange, exchange_counts, scale_gradient, sorted_rows
from moefx.routing.experts import Experts
from moefx.routing.weights import FFNWeights


class ParallelExperts(Experts):
    """Stand where :class:`Experts` stood: the same call, the same sum, but only the experts of this rank are here.

    Rows are sorted by slot, exchanged, computed in the order of senders within each expert (the order one process would
    have if it held all ranks' tokens), exchanged back, and summed in slot order at home: a rerun gives the same bits.
    Each call makes three collectives, its backward pass two, on every rank, however few tokens it has.

    The gradient of a stacked weight is divided by G: what the ranks' losses would give if they were *averaged*, as
    DistributedDataParallel does for the replicated parameters.

    Args:
        experts: all E experts; their tensors are left as they are.
        homes: expert numbers of each rank, ascending.
        rank: this one.
        group: name of the process group of the G ranks.

    Attributes:
        num_experts: E; ``w_in`` and the other stacked parameters hold those of ``local_experts`` only, in that order.
    """

    slot_of_expert: Tensor
    slot_bounds: Tensor

    def __init__(self, experts: Experts, homes: Sequence[Sequence[int]], rank: int, group: str) -> None:
        super().__init__(_take(experts.weights(), homes[rank]), experts.act)
        self.local_experts = tuple(int(e) for e in homes[rank])
        self.b_out = experts.b_out
        for name, parameter in experts.named_parameters(recurse=False):
            self.get_parameter(name).requires_grad_(parameter.requires_grad)
        self.num_experts = experts.num_experts
        self.experts_per_rank: Splits = [len(home) for home in homes]
        self.rank, self.group = rank, group
        self.homes = tuple(tuple(int(e) for e in home) for home in homes)
        self._register_tables(experts.w_in.device)
        self.train(experts.training)

    @property
    def stacked_names(self) -> list[str]:
        """Names of the parameters that are cut by expert."""
        return [name for name, _ in self.named_parameters(recurse=False) if name != "b_out"]

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts, wherever they are; see :meth:`Experts.forward`."""
        if self.slot_of_expert.device != x_TD.device:
            self._register_tables(x_TD.device)
        order_R, offsets = ops.group(self._slots(experts_TK), self.num_experts)
        arrivals = exchange_counts(offsets.diff(), self.experts_per_rank, self.rank, self.group)
        sent_G, received_G = offsets[self.slot_bounds].diff(), arrivals.sum(dim=1)
        splits = torch.cat([sent_G, received_G]).tolist()  # the one wait for the device: splits are host numbers
        sent, received = splits[: len(sent_G)], splits[len(sent_G) :]
        rows_RD = sorted_rows(x_TD, order_R, experts_TK.shape[1])
        dropped = order_R.shape[0] - sum(sent)
        kept_RD, _ = torch.split(rows_RD, [sum(sent), dropped])
        arrived_AD = exchange(kept_RD, sent, received, self.group)
        done_AD = self._compute(arrived_AD, arrivals, sum(received))
        back_RD = exchange(done_AD, received, sent, self.group)
        if guard_or_true(dropped > 0):
            back_RD = torch.cat([back_RD, back_RD.new_zeros((dropped, back_RD.shape[1]))])
        y_TD: Tensor = ops.combine(back_RD, order_R, gates_TK)
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    def _slots(self, experts_TK: Tensor) -> Tensor:
        """Return the slot of each chosen expert; E for an index outside [0, E), which is sent nowhere."""
        known = (experts_TK >= 0) & (experts_TK < self.num_experts)
        return self.slot_of_expert[torch.where(known, experts_TK, self.num_experts)]

    def _compute(self, rows_AD: Tensor, arrivals: Tensor, total: int) -> Tensor:
        """Run the experts of this rank on the rows that arrived: by sender, then by expert."""
        weights = replace(self.weights(), b_out=None).map(lambda w: scale_gradient(w, 1 / len(self.experts_per_rank)))
        if not self.local_experts:
            return _nothing(rows_AD, weights)
        ranks, local = arrivals.shape
        expert_of_row = torch.arange(local, device=rows_AD.device).repeat(ranks)
        expert_of_row = expert_of_row.repeat_interleave(arrivals.reshape(-1), output_size=total)
        order, offsets = ops.group(expert_of_row.unsqueeze(1), local)
        h = ops.grouped_linear(rows_AD, weights.w_in, weights.b_in, order, offsets, 1)
        if weights.w_gate is None:
            h = self.act(h)
        else:
            h = self.act(h, ops.grouped_linear(rows_AD, weights.w_gate, weights.b_gate, order, offsets, 1))
        done = ops.grouped_linear(h, weights.w_out, None, None, offsets)
        wide = torch.promote_types(done.dtype, torch.float32)
        return ops.combine(done, order, done.new_ones((total, 1), dtype=wide))  # back to the order of arrival

    def _register_tables(self, device: torch.device) -> None:
        """Build the index tables; again after loading on ``meta``, where they have no values."""
        slot_of_expert = torch.empty(self.num_experts + 1, dtype=torch.int64)
        slot_of_expert[torch.tensor([e for home in self.homes for e in home])] = torch.arange(self.num_experts)
        slot_of_expert[-1] = self.num_experts
        bounds = torch.tensor([0, *self.experts_per_rank], dtype=torch.int64).cumsum(0)
        self.register_buffer("slot_of_expert", slot_of_expert.to(device), persistent=False)
        self.register_buffer("slot_bounds", bounds.to(device), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take this rank's experts where a checkpoint holds all of them."""
        for name in self.stacked_names:
            full = state_dict.get(prefix + name)
            if isinstance(full, Tensor) and full.shape[:1] == (self.num_experts,):
                state_dict[prefix + name] = _rows(full, self.local_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"{super().extra_repr()}, experts {list(self.local_experts)} of {self.num_experts}"


def _rows(tensor: Tensor, experts: Sequence[int]) -> Tensor:
    return tensor.detach().index_select(0, torch.tensor(experts, dtype=torch.int64, device=tensor.device))


def _take(weights: FFNWeights, experts: Sequence[int]) -> FFNWeights:
    return replace(weights, b_out=None).map(lambda tensor: _rows(tensor, experts))


def _nothing(rows_0D: Tensor, weights: FFNWeights) -> Tensor:
    """Return no rows, with the dependencies that rows have on other ranks: their backward pass has collectives."""
    h = F.linear(rows_0D, weights.w_in.sum(0))
    if weights.w_gate is not None:
        h = h * F.linear(rows_0D, weights.w_gate.sum(0))
    return F.linear(h, weights.w_out.sum(0))

"""Experts of which each process holds some; tokens travel to them and back.

Legend: T tokens of this rank, K experts per token, R = T·K rows, E experts, G ranks, D width, A rows that arrive here,
C copies of an expert. A *slot* is one holding of one expert by one rank; see :class:`Roster`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_true

from moefx import ops
from moefx.parallel.dispatch import send_in_chunks, send_once
from moefx.parallel.exchange import exchange, exchange_counts, scale_gradient, sorted_rows
from moefx.parallel.roster import Roster
from moefx.routing.experts import Experts
from moefx.routing.weights import FFNWeights


class ParallelExperts(Experts):
    """Stand where :class:`Experts` stood: the same call, the same sum, but only the experts of this rank are here.

    Rows are sorted by slot, exchanged, computed in the order of senders within each expert (the order one process would
    have if it held all ranks' tokens), exchanged back, and summed in slot order at home: a rerun gives the same bits.
    Each call makes three collectives, its backward pass two, on every rank, however few tokens it has.

    With r chunks the tokens go in r parts, so that rows of one part travel while experts work on another; every part
    costs two more collectives. With ``once`` a token that chose several experts of one rank is sent there once, with
    its gates, and what comes back is their sum: fewer bytes, and sums in another order.

    Copies of an expert are sent its weights in every call that computes gradients, and send the gradients of these
    back; so they train as one. Without gradients they keep them until the next training step, load or change of mode.

    The gradient of a stacked weight is divided by G: what the ranks' losses would give if they were *averaged*, as
    DistributedDataParallel does for the replicated parameters.

    Args:
        experts: all E experts; their tensors are left as they are.
        roster: who holds what.
        rank: this one.
        group: name of the process group of the G ranks.
        chunks: r.
        once: send a token to each rank at most once.
        shared: to compute ahead while rows travel; see :mod:`moefx.parallel.overlap`.

    Attributes:
        num_experts: E; ``w_in`` and the other stacked parameters hold those of ``local_experts`` only, in that order.
    """

    slot_of_copy: Tensor
    end_of_copy: Tensor
    slot_bounds: Tensor
    # Experts that choose their tokens would see those of this rank alone: their choice goes by tokens.
    by_expert = None  # type: ignore[assignment]

    def __init__(
        self,
        experts: Experts,
        roster: Roster,
        rank: int,
        group: str,
        *,
        chunks: int = 1,
        once: bool = False,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__(_take(experts.weights(), roster.homes[rank]), experts.act)
        self.b_out = experts.b_out
        for name, parameter in experts.named_parameters(recurse=False):
            self.get_parameter(name).requires_grad_(parameter.requires_grad)
        self.num_experts = experts.num_experts
        self.rank, self.group, self.roster = rank, group, roster
        self.chunks, self.once = chunks, once
        # A tuple, so that it is no submodule.
        self.meanwhile: tuple[nn.Module, ...] = () if shared is None else (shared,)
        self._copied: FFNWeights | None = None
        self._register_tables(experts.w_in.device)
        self.train(experts.training)

    @property
    def local_experts(self) -> tuple[int, ...]:
        """Experts whose primary is here, ascending."""
        return self.roster.homes[self.rank]

    @property
    def homes(self) -> tuple[tuple[int, ...], ...]:
        """Experts of each rank whose primary is there, ascending."""
        return self.roster.homes

    @property
    def stacked_names(self) -> list[str]:
        """Names of the parameters that are cut by expert."""
        return [name for name, _ in self.named_parameters(recurse=False) if name != "b_out"]

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts, wherever they are; see :meth:`Experts.forward`."""
        if self.slot_bounds.device != x_TD.device:
            self._register_tables(x_TD.device)
        if self.once:
            return self._with_bias(send_once(self, x_TD, self._slots(experts_TK), gates_TK))
        if self.chunks > 1 or self.meanwhile:
            return self._with_bias(send_in_chunks(self, x_TD, self._slots(experts_TK), gates_TK))
        per_rank = self.roster.slots_per_rank
        order_R, offsets = ops.group(self._slots(experts_TK), sum(per_rank))
        arrivals = exchange_counts(offsets.diff(), per_rank, self.rank, self.group)
        sent_G, received_G = offsets[self.slot_bounds].diff(), arrivals.sum(dim=1)
        splits = torch.cat([sent_G, received_G]).tolist()  # the one wait for the device: splits are host numbers
        sent, received = splits[: len(sent_G)], splits[len(sent_G) :]
        rows_RD = sorted_rows(x_TD, order_R, experts_TK.shape[1])
        dropped = order_R.shape[0] - sum(sent)
        kept_RD, _ = torch.split(rows_RD, [sum(sent), dropped])
        arrived_AD = exchange(kept_RD, sent, received, self.group)
        done_AD = self.compute(self.held(), arrived_AD, arrivals, sum(received))
        back_RD = exchange(done_AD, received, sent, self.group)
        if guard_or_true(dropped > 0):
            back_RD = torch.cat([back_RD, back_RD.new_zeros((dropped, back_RD.shape[1]))])
        return self._with_bias(ops.combine(back_RD, order_R, gates_TK))

    def _with_bias(self, y_TD: Tensor) -> Tensor:
        return y_TD if self.b_out is None else y_TD + self.b_out.to(y_TD.dtype)

    def _slots(self, experts_TK: Tensor) -> Tensor:
        """Return the slot of each chosen expert; one past the last for an index outside [0, E), which goes nowhere.

        With copies, the rows of an expert are dealt out in token order, to each copy its share.
        """
        known = (experts_TK >= 0) & (experts_TK < self.num_experts)
        experts_TK = torch.where(known, experts_TK, self.num_experts)
        if not self.roster.has_copies:
            return self.slot_of_copy[experts_TK, 0]
        order_R, offsets = ops.group(experts_TK, self.num_experts + 1)
        expert_R = experts_TK.reshape(-1)[order_R]
        place_R = torch.arange(len(order_R), device=order_R.device) - offsets[expert_R]
        along_R = (place_R + 0.5) / offsets.diff()[expert_R]
        copy_R = (along_R.unsqueeze(1) > self.end_of_copy[expert_R]).sum(dim=1)
        slots_R = torch.empty_like(expert_R).scatter_(0, order_R, self.slot_of_copy[expert_R, copy_R])
        return slots_R.view_as(experts_TK)

    def compute(self, weights: FFNWeights, rows_AD: Tensor, arrivals: Tensor, total: int) -> Tensor:
        """Run the experts of this rank on the rows that arrived: by sender, then by slot ``[G, slots]``."""
        ranks, local = arrivals.shape
        slot_of_row = torch.arange(local, device=rows_AD.device).repeat(ranks)
        slot_of_row = slot_of_row.repeat_interleave(arrivals.reshape(-1), output_size=total)
        wide = torch.promote_types(rows_AD.dtype, torch.float32)
        ones = torch.ones((total, 1), dtype=wide, device=rows_AD.device)
        return self.local_sum(weights, rows_AD, slot_of_row.unsqueeze(1), ones)  # back in the order of arrival

    def local_sum(self, weights: FFNWeights, rows_AD: Tensor, slots_AK: Tensor, gates_AK: Tensor) -> Tensor:
        """Return the weighted sum over the slots of this rank; a slot outside it counts nothing."""
        local, k = weights.w_in.shape[0], slots_AK.shape[1]
        if not local:
            return _nothing(rows_AD, weights, gates_AK)
        order, offsets = ops.group(slots_AK, local)
        h = ops.grouped_linear(rows_AD, weights.w_in, weights.b_in, order, offsets, k)
        if weights.w_gate is None:
            h = self.act(h)
        else:
            h = self.act(h, ops.grouped_linear(rows_AD, weights.w_gate, weights.b_gate, order, offsets, k))
        done = ops.grouped_linear(h, weights.w_out, None, None, offsets)
        y: Tensor = ops.combine(done, order, gates_AK)
        return y

    def held(self) -> FFNWeights:
        """Return the weights of the slots of this rank: its own experts, then copies of others'. A collective."""
        return self._all_slots().map(lambda w: scale_gradient(w, 1 / len(self.homes)))

    def _all_slots(self) -> FFNWeights:
        own = replace(self.weights(), b_out=None)
        if not self.roster.has_copies:
            return own
        if torch.is_grad_enabled():
            self._copied = None
            copied = own.map(self._send_copies)
        elif self._copied is None:
            copied = self._copied = own.map(self._send_copies)
        else:
            copied = self._copied
        return FFNWeights(**{name: torch.cat([w, getattr(copied, name)]) for name, w in _tensors(own).items()})

    def _send_copies(self, own: Tensor) -> Tensor:
        """Send each rank the rows of its copies whose primary is here, and return those of our copies, ascending."""
        mine = {expert: i for i, expert in enumerate(self.local_experts)}
        wanted = [[mine[e] for e in copies if e in mine] for copies in self.roster.copies]
        ours = self.roster.copies[self.rank]
        arriving = [[e for e in ours if e in set(home)] for home in self.homes]
        rows = own.flatten(1)[torch.tensor([i for rank in wanted for i in rank], dtype=torch.int64, device=own.device)]
        arrived = exchange(rows, [len(r) for r in wanted], [len(r) for r in arriving], self.group)
        place = {expert: i for i, expert in enumerate(e for rank in arriving for e in rank)}
        order = torch.tensor([place[e] for e in ours], dtype=torch.int64, device=own.device)
        return arrived[order].reshape(len(order), *own.shape[1:])

    def rehome(self, roster: Roster) -> None:
        """Follow another roster from the next call on; the stacked parameters must hold its experts by then."""
        self.roster, self._copied = roster, None
        self._register_tables(self.slot_bounds.device)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; copies are sent their weights again."""
        self._copied = None
        return super().train(mode)

    def _register_tables(self, device: torch.device) -> None:
        """Build the index tables; again after loading on ``meta``, where they have no values."""
        slots, ends = self.roster.tables(self.rank)
        bounds = torch.tensor([0, *self.roster.slots_per_rank], dtype=torch.int64).cumsum(0)
        self.register_buffer("slot_of_copy", torch.from_numpy(slots).to(device), persistent=False)
        self.register_buffer("end_of_copy", torch.from_numpy(ends).to(device), persistent=False)
        self.register_buffer("slot_bounds", bounds.to(device), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take this rank's experts where a checkpoint holds all of them."""
        self._copied = None
        for name in self.stacked_names:
            full = state_dict.get(prefix + name)
            if isinstance(full, Tensor) and full.shape[:1] == (self.num_experts,):
                state_dict[prefix + name] = _rows(full, self.local_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        copies = self.roster.copies[self.rank]
        also = f" and copies of {list(copies)}" if copies else ""
        return f"{super().extra_repr()}, experts {list(self.local_experts)}{also} of {self.num_experts}"


def _rows(tensor: Tensor, experts: Sequence[int]) -> Tensor:
    return tensor.detach().index_select(0, torch.tensor(experts, dtype=torch.int64, device=tensor.device))


def _take(weights: FFNWeights, experts: Sequence[int]) -> FFNWeights:
    return replace(weights, b_out=None).map(lambda tensor: _rows(tensor, experts))


def _tensors(weights: FFNWeights) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(weights).items() if tensor is not None}


def _nothing(rows_0D: Tensor, weights: FFNWeights, gates_0K: Tensor) -> Tensor:
    """Return no rows, with the dependencies that rows have on other ranks: their backward pass has collectives."""
    h = F.linear(rows_0D, weights.w_in.sum(0))
    if weights.w_gate is not None:
        h = h * F.linear(rows_0D, weights.w_gate.sum(0))
    return F.linear(h, weights.w_out.sum(0)) * gates_0K.sum(1, keepdim=True).to(h.dtype)

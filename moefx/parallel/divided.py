"""What all kinds of divided experts have in common: who holds what, the way of rows, copies, loading.

Legend: T tokens of this rank, K experts per token, R = T·K rows, E experts, G ranks, D width, A rows that arrive here,
C copies of an expert. A *slot* is one holding of one expert by one rank; see :class:`Roster`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_true

from moefx import ops
from moefx.errors import PlanError
from moefx.parallel.dispatch import Rows, Weights, send_in_chunks, send_once
from moefx.parallel.exchange import exchange, exchange_counts, scale_gradient, sorted_rows
from moefx.parallel.roster import Roster
from moefx.passes.placement.stacks import stacked_parameters

# Rows, slots and gates to weighted sums.
Engine = Callable[[Tensor, Tensor, Tensor], Tensor]


def slots_of(experts_TK: Tensor, slot_of_copy: Tensor, end_of_copy: Tensor) -> Tensor:
    """Return the slot of each chosen expert, one past the last for an expert outside [0, E), which goes nowhere.

    With copies, the rows of an expert are dealt out in token order, to each copy its share.

    Args:
        experts_TK: chosen experts.
        slot_of_copy: ``[E+1, C]``; see :meth:`Roster.tables`.
        end_of_copy: ``[E+1, C]``.
    """
    experts = slot_of_copy.shape[0] - 1
    experts_TK = torch.where((experts_TK >= 0) & (experts_TK < experts), experts_TK, experts)
    if slot_of_copy.shape[1] == 1:
        return slot_of_copy[experts_TK, 0]
    order_R, offsets = ops.group(experts_TK, experts + 1)
    expert_R = experts_TK.reshape(-1)[order_R]
    place_R = torch.arange(len(order_R), device=order_R.device) - offsets[expert_R]
    along_R = (place_R + 0.5) / offsets.diff()[expert_R]
    copy_R = (along_R.unsqueeze(1) > end_of_copy[expert_R]).sum(dim=1)
    slots_R = torch.empty_like(expert_R).scatter_(0, order_R, slot_of_copy[expert_R, copy_R])
    return slots_R.view_as(experts_TK)


class DividedExperts(nn.Module):
    """Experts of which only some are here; tokens travel to the others. The base of one class per kind of experts.

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

    Attributes:
        num_experts: E; the stacked parameters hold those of ``local_experts`` only, in that order.
        overlaps: shared experts can be computed while the rows of this kind travel.
        engine: what computes this rank's experts where not all are on the device, or nothing; see
            :mod:`moefx.parallel.tiers`.
    """

    num_experts: int
    slot_of_copy: Tensor
    end_of_copy: Tensor
    slot_bounds: Tensor
    overlaps = True

    def divide(
        self,
        roster: Roster,
        rank: int,
        group: str,
        device: torch.device,
        *,
        chunks: int = 1,
        once: bool = False,
        shared: nn.Module | None = None,
    ) -> None:
        """Finish a kind's constructor, when its parameters are there.

        Args:
            roster: who holds what.
            rank: this one.
            group: name of the process group of the G ranks.
            device: of the parameters.
            chunks: r.
            once: send a token to each rank at most once.
            shared: to compute ahead while rows travel; see :mod:`moefx.parallel.overlap`.
        """
        self.rank, self.group, self.roster = rank, group, roster
        self.chunks, self.once = chunks, once
        # A tuple, so that it is no submodule.
        self.meanwhile: tuple[nn.Module, ...] = () if shared is None else (shared,)
        self.engine: tuple[Engine, ...] = ()
        self._copied: Weights | None = None
        self._register_tables(device)

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
        return list(stacked_parameters(self))

    def sum_over_experts(
        self, weights: Weights, rows: Rows, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor
    ) -> Tensor:
        """Return the weighted sum of what the chosen experts make of each token, wherever they are. A collective.

        Args:
            weights: of the slots of this rank, from :meth:`held`.
            rows: what experts make of rows.
            x_TD: tokens.
            experts_TK: int64 expert numbers; one outside [0, E) counts nothing.
            gates_TK: weights of the sum.
        """
        if self.engine and torch.is_grad_enabled() and (x_TD.requires_grad or gates_TK.requires_grad):
            raise PlanError(
                "compute gradients through experts that are streamed",
                found="they are for inference",
                do="run under torch.no_grad(), or parallelize without a budget and with a plan that fits",
            )
        if self.slot_bounds.device != x_TD.device:
            self._register_tables(x_TD.device)
        slots_TK = slots_of(experts_TK, self.slot_of_copy, self.end_of_copy)
        if self.once:
            return send_once(self, weights, rows, x_TD, slots_TK, gates_TK)
        if self.chunks > 1 or self.meanwhile:
            return send_in_chunks(self, weights, rows, x_TD, slots_TK, gates_TK)
        per_rank = self.roster.slots_per_rank
        order_R, offsets = ops.group(slots_TK, sum(per_rank))
        arrivals = exchange_counts(offsets.diff(), per_rank, self.rank, self.group)
        sent_G, received_G = offsets[self.slot_bounds].diff(), arrivals.sum(dim=1)
        splits = torch.cat([sent_G, received_G]).tolist()  # the one wait for the device: splits are host numbers
        sent, received = splits[: len(sent_G)], splits[len(sent_G) :]
        rows_RD = sorted_rows(x_TD, order_R, experts_TK.shape[1])
        dropped = order_R.shape[0] - sum(sent)
        kept_RD, _ = torch.split(rows_RD, [sum(sent), dropped])
        arrived_AD = exchange(kept_RD, sent, received, self.group)
        done_AD = self.compute(weights, rows, arrived_AD, arrivals, sum(received))
        back_RD = exchange(done_AD, received, sent, self.group)
        if guard_or_true(dropped > 0):
            back_RD = torch.cat([back_RD, back_RD.new_zeros((dropped, back_RD.shape[1]))])
        return ops.combine(back_RD, order_R, gates_TK)

    def compute(self, weights: Weights, rows: Rows, rows_AD: Tensor, arrivals: Tensor, total: int) -> Tensor:
        """Run the experts of this rank on the rows that arrived: by sender, then by slot ``[G, slots]``."""
        ranks, local = arrivals.shape
        slot_of_row = torch.arange(local, device=rows_AD.device).repeat(ranks)
        slot_of_row = slot_of_row.repeat_interleave(arrivals.reshape(-1), output_size=total)
        wide = torch.promote_types(rows_AD.dtype, torch.float32)
        ones = torch.ones((total, 1), dtype=wide, device=rows_AD.device)
        return self.local_sum(weights, rows, rows_AD, slot_of_row.unsqueeze(1), ones)  # back in the order of arrival

    def local_sum(self, weights: Weights, rows: Rows, rows_AD: Tensor, slots_AK: Tensor, gates_AK: Tensor) -> Tensor:
        """Return the weighted sum over the slots of this rank; a slot outside it counts nothing."""
        if self.engine:
            return self.engine[0](rows_AD, slots_AK, gates_AK)
        local = len(next(iter(weights.values())))
        if not local:  # no rows either, but the dependencies that rows have elsewhere: their backward has collectives
            weights = {name: torch.cat([w, w.new_zeros((1, *w.shape[1:]))]) for name, w in weights.items()}
        order, offsets = ops.group(slots_AK, max(local, 1))
        y: Tensor = ops.combine(rows(weights, rows_AD, order, offsets, slots_AK.shape[1]), order, gates_AK)
        return y

    def held(self) -> Weights:
        """Return the weights of the slots of this rank: its own experts, then copies of others'. A collective.

        Empty where an engine has them.
        """
        if self.engine:
            return {}
        share = 1 / len(self.homes)
        return {name: scale_gradient(w, share) for name, w in self._all_slots().items()}

    def _all_slots(self) -> Weights:
        own: Weights = dict(stacked_parameters(self))
        if not self.roster.has_copies:
            return own
        if torch.is_grad_enabled():
            self._copied = None
            copied = self._send_copies(own)
        elif self._copied is None:
            copied = self._copied = self._send_copies(own)
        else:
            copied = self._copied
        return {name: torch.cat([w, copied[name]]) for name, w in own.items()}

    def _send_copies(self, own: Weights) -> Weights:
        """Send each rank the rows of its copies whose primary is here, and return those of our copies, ascending."""
        mine = {expert: i for i, expert in enumerate(self.local_experts)}
        wanted = [[mine[e] for e in copies if e in mine] for copies in self.roster.copies]
        ours = self.roster.copies[self.rank]
        arriving = [[e for e in ours if e in set(home)] for home in self.homes]
        leaving = [i for rank in wanted for i in rank]
        place = {expert: i for i, expert in enumerate(e for rank in arriving for e in rank)}
        sizes = [len(r) for r in wanted], [len(r) for r in arriving]

        def send(tensor: Tensor) -> Tensor:
            first = torch.tensor(leaving, dtype=torch.int64, device=tensor.device)
            order = torch.tensor([place[e] for e in ours], dtype=torch.int64, device=tensor.device)
            arrived = exchange(flat_rows(tensor)[first], *sizes, self.group)
            return arrived[order].reshape(len(order), *tensor.shape[1:])

        return {name: send(tensor) for name, tensor in own.items()}

    def need_weights(self, asked: str) -> None:
        """Refuse what needs the weights of this rank's experts where they are streamed.

        Raises:
            PlanError: they are.
        """
        if self.engine:
            raise PlanError(asked, found="its experts are streamed", do="do it before, or parallelize without a budget")

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
        self.need_weights(f"load weights into {prefix.rstrip('.')}")
        self._copied = None
        for name in self.stacked_names:
            full = state_dict.get(prefix + name)
            if isinstance(full, Tensor) and full.shape[:1] == (self.num_experts,):
                state_dict[prefix + name] = take(full, self.local_experts)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        copies = self.roster.copies[self.rank]
        also = f" and copies of {list(copies)}" if copies else ""
        return f"{super().extra_repr()}, experts {list(self.local_experts)}{also} of {self.num_experts}"


def take(tensor: Tensor, experts: Sequence[int]) -> Tensor:
    """Return the rows of some experts."""
    return tensor.detach().index_select(0, torch.tensor(experts, dtype=torch.int64, device=tensor.device))


def flat_rows(tensor: Tensor) -> Tensor:
    """Return ``[E, ...]`` as ``[E, n]``, with no experts too."""
    return tensor.reshape(len(tensor), tensor.shape[1:].numel())

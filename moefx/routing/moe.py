"""A routed FFN: router, selection, gates, experts, and optionally a shared FFN.

Legend: B samples, T tokens in all, D width, E experts, N = E/G tied groups of G experts, K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.experts import Experts
from moefx.routing.normalise import check_mode, default_mode, normalise, selection_scores
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.select import expand_groups, top_k

if TYPE_CHECKING:
    from moefx.routing.samples import ModuleExperts


class Routing(NamedTuple):
    """One routing decision: ``experts`` and ``gates`` ``[T, K]``; ``logits`` ``[..., N]`` as the router gave them."""

    experts: Tensor
    gates: Tensor
    logits: Tensor


class RoutedFFN(KeepFloat32):
    """``y = Σ_{e ∈ S(x)} g_e(x) · E_e(x) + b_out + s · shared(x)``: stands where a dense FFN stood.

    Copies of one FFN reproduce it exactly for every router as long as the gates sum to one and nothing is shared; see
    `moefx.routing.initialise` for the starts that are exact and `moefx.routing.normalise` for the modes.

    Args:
        router: maps ``(x, *taps)`` to logits over N, shaped ``[B, ..., N]`` and broadcastable over the tokens (a
            per-sample router returns ``[B, 1, N]``). Its optional ``taps`` attribute names what else it reads.
            `LinearRouter` or one's own.
        experts: E stacked experts, called with tokens, expert indices and gates.
        top_k: K, experts per token; a multiple of ``granularity``.
        mode: normalisation mode, or None for `default_mode`: exact on copies and trainable.
        granularity: G. The router chooses among N = E/G groups; the G members of a group run together with one gate.
        scale: multiplies every gate.
        shared: an FFN every token passes, ``[..., D] → [..., D_o]``.
        shared_scale: s.
        selection_bias: keep a persistent float32 buffer ``selection_bias`` [N], added to the scores for selection only
            (auxiliary-loss-free balancing, or −inf to take an expert out).

    Attributes:
        gate_scale: u ``[N]`` of mode ``one_plus_su``, else None.
        record: `RoutingRecord` of the last call; ``record.load`` and its neighbours are the statistics.
        taps: names of the extra tensors that ``forward`` takes after x, in order.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        router: nn.Module,
        experts: Experts | ModuleExperts,
        *,
        top_k: int = 2,
        mode: str | None = None,
        granularity: int = 1,
        scale: float = 1.0,
        shared: nn.Module | None = None,
        shared_scale: float = 1.0,
        selection_bias: bool = False,
    ) -> None:
        super().__init__()
        groups = _groups(experts.num_experts, top_k, granularity)
        offered = getattr(router, "num_experts", groups)
        if offered != groups:
            raise OptionError(
                f"{experts.num_experts} experts in groups of {granularity}",
                found=f"a router over {offered}",
                do=f"give a router over {groups}",
            )
        self.router, self.experts, self.shared = router, experts, shared
        self.top_k, self.granularity, self.num_groups = top_k, granularity, groups
        self.mode = mode or default_mode(groups, top_k // granularity)
        check_mode(self.mode)
        self.scale, self.shared_scale = scale, shared_scale
        device = next(experts.parameters()).device
        self.register_buffer("selection_bias", torch.zeros(groups, device=device) if selection_bias else None)
        self.gate_scale = nn.Parameter(torch.zeros(groups, device=device)) if self.mode == "one_plus_su" else None
        self.record = RoutingRecord(groups, device=device)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the extra tensors the router reads."""
        return tuple(getattr(self.router, "taps", ()))

    def route(self, x: Tensor, *taps: Tensor) -> Routing:
        """Choose experts and gates for every token of ``x`` ``[B, ..., D]`` and record the choice."""
        logits = self.router(x, *taps)
        if logits.shape[-1] != self.num_groups:
            raise InputError(
                "route tokens",
                found=f"logits {tuple(logits.shape)}",
                do=f"the router must return [..., {self.num_groups}]",
            )
        logits = logits.to(at_least_float32(logits))
        scores = selection_scores(logits.detach(), self.mode, self.selection_bias)
        groups = top_k(scores, self.top_k // self.granularity)
        gates = normalise(logits, groups, self.mode, scale=self.scale, u=self.gate_scale)
        self.record.update(logits.reshape(-1, self.num_groups), groups.reshape(-1, groups.shape[-1]), self.mode)
        experts, gates = expand_groups(groups, gates, self.granularity)
        tokens = (*x.shape[:-1], self.top_k)
        return Routing(
            experts.expand(tokens).reshape(-1, self.top_k), gates.expand(tokens).reshape(-1, self.top_k), logits
        )

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, ..., D]`` to ``[B, ..., D_o]``; ``taps`` are the tensors named in ``self.taps``, in order."""
        routing = self.route(x, *taps)
        y_TD: Tensor = self.experts(x.reshape(-1, x.shape[-1]), routing.experts, routing.gates)
        y = y_TD.reshape(*x.shape[:-1], y_TD.shape[-1])
        if self.shared is None:
            return y
        shared: Tensor = self.shared(x)
        return y + (shared if self.shared_scale == 1.0 else shared * self.shared_scale)

    def expert_load(self) -> Tensor:
        """Return the fraction of the last call's assignments per *expert* ``[E]``: its group's, shared equally."""
        return self.record.load.repeat_interleave(self.granularity) / self.granularity

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"top_k={self.top_k}, mode={self.mode!r}, granularity={self.granularity}, scale={self.scale}"


def _groups(experts: int, top_k: int, granularity: int) -> int:
    """Return N = E/G after checking that E and K are whole numbers of groups."""
    if granularity < 1 or experts % granularity or top_k % granularity or not 1 <= top_k <= experts:
        raise OptionError(
            f"top {top_k} of {experts} experts in groups of {granularity}",
            found="not whole groups, or more experts than there are",
            do="make experts and top_k multiples of the granularity, and top_k at most experts",
        )
    return experts // granularity

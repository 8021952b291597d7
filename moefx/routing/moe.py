"""A routed FFN: router, selector, gates, experts, combine, and optionally a shared FFN. Each slot takes any object.

Legend: B samples, T tokens in all, D width, E experts, N = E/G tied groups of G experts, K experts per token, C tokens
per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.by_expert import to_token_choice
from moefx.routing.experts import Experts
from moefx.routing.finite import check_policy, handle_non_finite
from moefx.routing.normalise import check_mode, default_mode, normalise, selection_scores
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.select import expand_groups
from moefx.routing.selectors import Selector, TopK
from moefx.routing.static import Sum, fold_experts, folds, reads_tokens

if TYPE_CHECKING:
    from moefx.routing.samples import ModuleExperts


class Routing(NamedTuple):
    """One routing decision.

    Attributes:
        experts: ``[T, K]``; E or more marks an empty slot.
        gates: ``[T, K]``, 0 in empty slots.
        logits: ``[..., N]`` as the router gave them, at least float32.
        tokens: where experts chose tokens, ``[E, C]`` token indices (T or more: none); else None.
        token_gates: gates in the order of ``tokens``.
        state: what a router with memory hands to the next layer's, else None.
    """

    experts: Tensor
    gates: Tensor
    logits: Tensor
    tokens: Tensor | None = None
    token_gates: Tensor | None = None
    state: Tensor | None = None


class Decision(NamedTuple):
    """What a loss may read: ``x`` ``[T, D]``, ``logits`` ``[T, N]``, ``groups`` and ``gates`` ``[T, K]`` (N: empty).

    ``samples`` is B; the tokens of a sample follow each other.
    """

    layer: RoutedFFN
    samples: int
    x: Tensor
    logits: Tensor
    groups: Tensor
    gates: Tensor


Loss = Callable[[Decision], Tensor]


class RoutedFFN(KeepFloat32):
    """``y = Σ_{e ∈ S(x)} g_e(x) · E_e(x) + b_out + s · shared(x)``: stands where a dense FFN stood.

    Copies of one FFN reproduce it exactly for every router as long as the gates sum to one and nothing is shared; see
    `moefx.routing.initialise` for the starts that are exact and `moefx.routing.normalise` for the modes.

    Args:
        router: maps ``(x, *taps)`` to logits over N, shaped ``[B, ..., N]`` and broadcastable over the tokens (a
            per-sample router returns ``[B, 1, N]``). Its optional ``taps`` attribute names what else it reads. With a
            true ``stateful`` it takes the previous layer's state as a last argument, or None, and returns
            ``(logits, state)``. `LinearRouter`, `moefx.routing.scorers.Router` or one's own.
        experts: E experts, called with tokens, expert indices and gates.
        top_k: K, experts per token; a multiple of ``granularity``. Read only without ``selector``.
        selector: which experts a token gets, or which tokens an expert gets; None for the ``top_k`` best.
        mode: normalisation mode, or None for `default_mode`: exact on copies and trainable.
        granularity: G. The router chooses among N = E/G groups; the G members of a group run together with one gate.
        scale: multiplies every gate.
        shared: an FFN every token passes, ``[..., D] → [..., D_o]``.
        shared_scale: s.
        selection_bias: keep a persistent float32 buffer ``selection_bias`` [N], added to the scores for selection only
            (auxiliary-loss-free balancing, or −inf to take an expert out).
        losses: further terms of the auxiliary loss by name, computed while gradients are on.
        coefficients: what each term counts unless told otherwise; see `RoutingRecord`.
        non_finite: what NaN or infinite logits do, see `moefx.routing.finite`.

    Attributes:
        gate_scale: u ``[N]`` of mode ``one_plus_su``, else None.
        record: `RoutingRecord` of the last call; ``record.load`` and its neighbours are the statistics.
        taps: names of the extra tensors that ``forward`` takes after x, in order.
        stateful: ``forward`` takes the router's state as its last argument and returns ``(y, state)``.
    """

    selection_bias: Tensor | None

    def __init__(
        self,
        router: nn.Module,
        experts: Experts | ModuleExperts | nn.Module,
        *,
        top_k: int = 2,
        selector: Selector | None = None,
        mode: str | None = None,
        granularity: int = 1,
        scale: float = 1.0,
        shared: nn.Module | None = None,
        shared_scale: float = 1.0,
        selection_bias: bool = False,
        losses: Mapping[str, Loss] | None = None,
        coefficients: Mapping[str, float] | None = None,
        non_finite: str = "propagate",
    ) -> None:
        super().__init__()
        count = int(experts.num_experts)  # type: ignore[arg-type]
        groups = _groups(count, top_k if selector is None else granularity, granularity)
        offered = getattr(router, "num_experts", groups)
        if offered != groups:
            raise OptionError(
                f"{count} experts in groups of {granularity}",
                found=f"a router over {offered}",
                do=f"give a router over {groups}",
            )
        self.router, self.experts, self.shared = router, experts, shared
        self.selector = TopK(top_k // granularity) if selector is None else selector
        self.granularity, self.num_groups = granularity, groups
        self.mode = mode or default_mode(groups, self.selector.slots(groups))
        check_mode(self.mode)
        self.scale, self.shared_scale = scale, shared_scale
        self.losses, self.non_finite = dict(losses or {}), check_policy(non_finite)
        self.stateful = bool(getattr(router, "stateful", False))
        device = next(experts.parameters()).device
        self.register_buffer("selection_bias", torch.zeros(groups, device=device) if selection_bias else None)
        self.gate_scale = nn.Parameter(torch.zeros(groups, device=device)) if self.mode == "one_plus_su" else None
        self.record = RoutingRecord(groups, device=device, coefficients=coefficients)

    @property
    def top_k(self) -> int:
        """K, the most experts a token gets."""
        return self.selector.slots(self.num_groups) * self.granularity

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the extra tensors that the router and the selector read, each once."""
        return tuple(dict.fromkeys((*getattr(self.router, "taps", ()), *self.selector.taps)))

    def route(self, x: Tensor, *taps: Tensor) -> Routing:
        """Choose experts and gates for every token of ``x`` ``[B, ..., D]`` and record the choice."""
        logits, state = self._logits(x, *taps)
        broken = handle_non_finite(logits, self.non_finite)
        if broken is not None:
            logits = logits.masked_fill(broken, 0)
        by_expert = self.selector.by_expert
        scores = selection_scores(logits.detach(), self.mode, self.selection_bias, across_tokens=by_expert)
        if broken is not None and by_expert:
            scores = scores.masked_fill(broken, float("-inf"))
        chosen = self.selector(scores, x, *self._values(self.selector.taps, taps))
        count = math.prod(x.shape[:-1]) if by_expert else 0
        groups = to_token_choice(chosen, count).view(*x.shape[:-1], self.num_groups) if by_expert else chosen
        partial = self.selector.partial or broken is not None
        if broken is not None:
            groups = groups.masked_fill(broken, self.num_groups)
        tokenwise = logits.expand(*groups.shape[:-1], -1)
        gates = normalise(tokenwise, groups, self.mode, scale=self.scale, u=self.gate_scale, partial=partial)
        self._record(x, logits, groups, gates)
        experts, gates = expand_groups(groups, gates, self.granularity)
        experts, gates = _per_token(experts, x), _per_token(gates, x)
        if not by_expert:
            return Routing(experts, gates, logits, state=state)
        tokens = chosen.repeat_interleave(self.granularity, 0)
        padded = torch.cat([gates, gates.new_zeros((1, gates.shape[1]))])
        return Routing(experts, gates, logits, tokens, padded.T.gather(1, tokens.clamp(max=count)), state)

    def _logits(self, x: Tensor, *taps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits, at least float32, and the router's new state."""
        values = self._values(getattr(self.router, "taps", ()), taps)
        made: Any = self.router(x, *values, *taps[len(self.taps) :]) if self.stateful else self.router(x, *values)
        logits, state = made if self.stateful else (made, None)
        if logits.shape[-1] != self.num_groups:
            raise InputError(
                "route tokens",
                found=f"logits {tuple(logits.shape)}",
                do=f"the router must return [..., {self.num_groups}]",
            )
        return logits.to(at_least_float32(logits)), state

    def _values(self, names: tuple[str, ...], taps: tuple[Tensor, ...]) -> list[Tensor]:
        mine = self.taps
        if mine and not len(mine) <= len(taps) <= len(mine) + self.stateful:
            raise InputError(
                f"route with taps {mine}", found=f"{len(taps)} taps", do="pass each declared tap, in order"
            )
        # A router of one's own without declared taps gets whatever was passed.
        return [taps[mine.index(name)] for name in names] if mine or self.stateful else list(taps)

    def _record(self, x: Tensor, logits: Tensor, groups: Tensor, gates: Tensor) -> None:
        flat = logits.reshape(-1, self.num_groups)
        self.record.update(flat, groups.reshape(-1, groups.shape[-1]), self.mode)
        if not (self.losses and torch.is_grad_enabled()):
            return
        tokens = x.reshape(-1, x.shape[-1])
        per_token = (_per_token(values, x) for values in (logits, groups, gates))
        decision = Decision(self, x.shape[0], tokens, *per_token)
        for name, loss in self.losses.items():
            self.record.add(name, loss(decision))

    def forward(self, x: Tensor, *taps: Tensor) -> Any:
        """Map ``[B, ..., D]`` to ``[B, ..., D_o]``; ``taps`` are the tensors named in ``self.taps``, in order."""
        routing = self.route(x, *taps)
        flat = x.reshape(-1, x.shape[-1])
        by_expert = _batched_form(self.experts)
        # Who watches the experts' calls is shown expert indices, the form that both families of selectors have.
        watched = not torch.compiler.is_compiling() and bool(self.experts._forward_pre_hooks)
        if routing.tokens is not None and by_expert is not None and not watched:
            y_TD = by_expert(flat, routing.tokens, routing.token_gates)
        else:
            y_TD = self.experts(flat, routing.experts, routing.gates)
        y = y_TD.reshape(*x.shape[:-1], y_TD.shape[-1])
        if self.shared is not None:
            shared: Tensor = self.shared(x)
            y = y + (shared if self.shared_scale == 1.0 else shared * self.shared_scale)
        return (y, routing.state) if self.stateful else y

    @property
    def deciding(self) -> tuple[int, ...]:
        """Positions of the arguments that decide, if no token does; see `moefx.routing.static`."""
        tokens = reads_tokens(self.router) or self.selector.by_expert or self.stateful
        return () if tokens or not folds(self.experts) else tuple(range(1, 1 + len(self.taps)))

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the choice that these values of the taps make, and the chosen experts as one module."""
        experts, gates, *_ = self.route(values[0].new_zeros((1, 1, 1)), *values)
        choice, static = fold_experts(self.experts, experts[0], gates[0], shared)
        return choice, static if self.shared is None else Sum(static, self.shared, self.shared_scale)

    def expert_load(self) -> Tensor:
        """Return the fraction of the last call's assignments per *expert* ``[E]``: its group's, shared equally."""
        return self.record.load.repeat_interleave(self.granularity) / self.granularity

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"top_k={self.top_k}, mode={self.mode!r}, granularity={self.granularity}, scale={self.scale}"


def _batched_form(experts: Any) -> Callable[..., Tensor] | None:
    """Return the call for tokens that experts chose, unless it is inherited by a class with a forward of its own."""
    cls = type(experts)
    foreign = isinstance(experts, Experts) and cls.forward is not Experts.forward
    if foreign and cls.by_expert is Experts.by_expert:
        return None
    found: Callable[..., Tensor] | None = getattr(experts, "by_expert", None)
    return found


def _per_token(values: Tensor, x: Tensor) -> Tensor:
    """Return ``values`` ``[..., K]`` as ``[T, K]``, repeated where one row stands for the tokens of a sample."""
    width = values.shape[-1]
    return values.expand(*x.shape[:-1], width).reshape(-1, width)


def _groups(experts: int, top_k: int, granularity: int) -> int:
    """Return N = E/G after checking that E and K are whole numbers of groups."""
    if granularity < 1 or experts % granularity or top_k % granularity or not 1 <= top_k <= experts:
        raise OptionError(
            f"top {top_k} of {experts} experts in groups of {granularity}",
            found="not whole groups, or more experts than there are",
            do="make experts and top_k multiples of the granularity, and top_k at most experts",
        )
    return experts // granularity

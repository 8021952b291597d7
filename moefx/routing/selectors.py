"""Selectors: which experts a token gets, or which tokens an expert gets. Small objects, any of which a layer may hold.

Two families. *Token choice* returns expert indices ``[..., K]`` in which N means "none": the group operator sorts
such slots behind all experts, and their gate is 0. *By expert* returns token indices ``[N, C]`` into the flattened
tokens, in which B·T means "none"; C follows from shapes alone. A selector of one's own is any module with the
attributes of `Selector`.

Legend: B samples, T tokens of a sample, N experts (or tied groups), K slots per token, C tokens per expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from moefx.errors import InputError, OptionError
from moefx.routing.precision import KeepFloat32
from moefx.routing.record import _only_mathematics, _recomputing
from moefx.routing.select import group_limited_top_k, top_k


class Selector(KeepFloat32):
    """Base of all selectors.

    Attributes:
        by_expert: the result is ``[N, C]`` token indices instead of ``[..., K]`` expert indices.
        partial: a slot may be empty.
        batch_invariant: a sample's choice is the same whatever else is in its batch.
        taps: names of further tensors that ``forward`` takes.
    """

    by_expert: bool = False
    partial: bool = False
    batch_invariant: bool = True
    taps: tuple[str, ...] = ()

    def slots(self, num_experts: int) -> int:
        """Return K among N experts."""
        return num_experts

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Choose by ``scores`` ``[B, ..., N]`` (broadcastable over the tokens ``x`` ``[B, ..., D]``)."""
        raise NotImplementedError


class TopK(Selector):
    """The k highest scores of each token."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def slots(self, num_experts: int) -> int:
        """Return k.

        Raises:
            OptionError: there are fewer experts.
        """
        if not 1 <= self.k <= num_experts:
            raise OptionError(f"select the top {self.k}", found=f"{num_experts} experts", do="choose 1 <= k <= experts")
        return self.k

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., k]``, best first."""
        return top_k(scores, self.k)

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"k={self.k}"


class GroupLimitedTopK(TopK):
    """The k highest scores among the best ``keep`` of ``groups`` groups (DeepSeek-V3, arXiv 2412.19437)."""

    def __init__(self, k: int, *, groups: int, keep: int, best: int = 2) -> None:
        super().__init__(k)
        self.groups, self.keep, self.best = groups, keep, best

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., k]``, best first."""
        return group_limited_top_k(scores, self.k, groups=self.groups, keep=self.keep, best=self.best)


class Multinomial(TopK):
    """While training k draws without replacement from softmax(scores), else the k highest (MoDE, arXiv 2412.12953).

    Drawn as the top k of ``scores + Gumbel noise``, which has the same distribution, cannot run out of experts whose
    probability underflows, and needs no host.
    """

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., k]``."""
        return top_k(scores + gumbel(scores) if self.training else scores, self.k)


class NoisyTopK(TopK):
    """While training the top k of ``scores + σ ε`` with normal ε, else of the scores."""

    def __init__(self, k: int, *, noise: float) -> None:
        super().__init__(k)
        self.noise = noise

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., k]``."""
        return top_k(scores + self.noise * torch.randn_like(scores) if self.training else scores, self.k)


class TopP(Selector):
    """The smallest set of experts whose probability reaches p (Dynamic MoE, arXiv 2403.07652).

    Rank r stays if the probability *before* it is below p, so the expert that crosses p stays and one always does.

    Args:
        p: threshold on the cumulative softmax probability.
        width: most experts per token; None for all.
    """

    partial = True

    def __init__(self, p: float, *, width: int | None = None) -> None:
        super().__init__()
        self.p, self.width = p, width

    def slots(self, num_experts: int) -> int:
        """Return the most experts a token can get."""
        return min(self.width or num_experts, num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        experts = scores.shape[-1]
        ranked = top_k(scores, self.slots(experts))
        probability = scores.softmax(-1).gather(-1, ranked)
        before = probability.cumsum(-1) - probability
        first = torch.arange(ranked.shape[-1], device=scores.device) == 0
        return torch.where((before < self.p) | first, ranked, experts)

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"p={self.p}, width={self.width}"


class Threshold(Selector):
    """Every expert whose score exceeds its cut, best first.

    Args:
        num_experts: N.
        cut: start of the cut ``[N]``, a persistent float32 buffer, so that calibration or an EMA may move it.
        width: most experts per token; None for all.
    """

    partial = True
    cut: Tensor

    def __init__(self, num_experts: int, *, cut: float = 0.0, width: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("cut", torch.full((num_experts,), cut, dtype=torch.float32))

    def slots(self, num_experts: int) -> int:
        """Return the most experts a token can get."""
        return min(self.width or num_experts, num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        return best_of(scores, scores > self.cut.to(scores.dtype), self.slots(scores.shape[-1]))


class Race(Threshold):
    """The best ``mean_k · tokens`` of all (token, expert) pairs of a batch at once (Race-DiT, arXiv 2503.16057).

    Else than in training a pair wins if it exceeds the cut, a moving average of the last winner's score, so that a
    sample's result does not depend on its batch. The average is corrected for its start at zero.

    Args:
        num_experts: N.
        mean_k: experts per token on average.
        momentum: of the moving average.
        width: most experts per token; None for all.
    """

    steps: Tensor

    def __init__(
        self, num_experts: int, *, mean_k: float = 2.0, momentum: float = 0.99, width: int | None = None
    ) -> None:
        super().__init__(num_experts, width=width)
        self.mean_k, self.momentum = mean_k, momentum
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32))

    @property
    def batch_invariant(self) -> bool:  # type: ignore[override]
        """Whether a sample is alone: in training it competes with its batch."""
        return not self.training

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        if not self.training:
            return super().forward(scores, x)
        flat = scores.reshape(-1)
        tokens = flat.shape[0] // scores.shape[-1]
        winners = share(tokens, self.mean_k, 1, tokens * scores.shape[-1])
        order = flat.sort(descending=True, stable=True)
        won = torch.zeros_like(flat, dtype=torch.bool).scatter(0, order.indices[:winners], True)
        self._average(order.values[:winners][-1:])
        return best_of(scores, won.view(scores.shape), self.slots(scores.shape[-1]))

    @torch.no_grad()
    def _average(self, last: Tensor) -> None:
        if stateless(last):
            return
        m, last = self.momentum, last.to(self.cut.dtype).expand_as(self.cut) if last.numel() else self.cut
        self.steps.add_(1)
        weight = (1 - m) / (1 - m**self.steps)
        self.cut.add_(weight * (last - self.cut))


class GumbelSigmoid(Selector):
    """Each expert on or off by itself: while training ``σ((score + noise)/τ) > ½`` with logistic noise, else score > 0.

    Use with mode ``sigmoid_ste``, whose gates are 1 with the gradient of σ.
    """

    partial = True

    def __init__(self, *, width: int | None = None) -> None:
        super().__init__()
        self.width = width

    def slots(self, num_experts: int) -> int:
        """Return the most experts a token can get."""
        return min(self.width or num_experts, num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        noisy = scores + gumbel(scores) - gumbel(scores) if self.training else scores
        return best_of(noisy, noisy > 0, self.slots(scores.shape[-1]))


class All(Selector):
    """Every expert, in order: soft routing."""

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        return torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)


class Interval(Selector):
    """The experts of the timestep's intervals, one for each of several partitions of [0, steps).

    Partition j cuts the timesteps into ``counts[j]`` intervals; its experts follow those of the partitions before it.
    Intervals are half open, so a boundary belongs to one of them.

    Args:
        counts: numbers of intervals; N is their sum.
        steps: timesteps are in [0, steps); 1 for flow models that pass σ.
        bounds: inner boundaries of the first partition instead of equal ones, ascending (for instance from a dynamic
            programme over log SNR, ANT, arXiv 2306.00354).
    """

    taps = ("timestep",)

    def __init__(self, counts: Sequence[int], *, steps: float = 1000.0, bounds: Sequence[float] | None = None) -> None:
        super().__init__()
        self.counts, self.steps = tuple(counts), steps
        self.bounds = None if bounds is None else tuple(bounds)
        wrong = self.bounds is not None and (
            len(self.bounds) != self.counts[0] - 1 or sorted(self.bounds) != list(self.bounds)
        )
        if not self.counts or min(self.counts) < 1 or wrong:
            raise OptionError(
                f"timestep intervals {self.counts} with bounds {self.bounds}",
                found="no interval, or not one ascending bound between each two",
                do="give counts >= 1 and counts[0] - 1 bounds",
            )

    def slots(self, num_experts: int) -> int:
        """Return one per partition."""
        if sum(self.counts) != num_experts:
            raise OptionError(
                f"{num_experts} experts for intervals {self.counts}",
                found=f"{sum(self.counts)} intervals",
                do="have one expert per interval",
            )
        return len(self.counts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[B, 1, ..., len(counts)]`` from the raw timestep ``[B]`` or ``[]``; scores are not read."""
        chosen = self.index(taps[0])
        shape = (chosen.shape[0], *[1] * (x.ndim - 2), chosen.shape[-1])
        return chosen.view(shape).expand(*scores.shape[:-1], -1) if scores.ndim == x.ndim else chosen.view(shape)

    def index(self, timestep: Tensor) -> Tensor:
        """Return the experts of each timestep, ``[B, len(counts)]``."""
        if timestep.ndim > 1:
            raise InputError(
                "choose experts by timestep interval",
                found=f"a timestep of shape {tuple(timestep.shape)}",
                do="pass raw timesteps [B], not an embedding",
            )
        t = timestep.reshape(-1).to(torch.float64 if timestep.element_size() == 8 else torch.float32)
        found, first = [], 0
        for j, count in enumerate(self.counts):
            if j == 0 and self.bounds is not None:
                index = torch.bucketize(t, torch.tensor(self.bounds, dtype=t.dtype, device=t.device), right=True)
            else:
                index = (t * (count / self.steps)).floor().clamp(0, count - 1).long()
            found.append(index + first)
            first += count
        return torch.stack(found, -1)

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"counts={self.counts}, steps={self.steps}"


class Forced(Selector):
    """A fixed set of experts for every token, and what another selector takes of the rest."""

    partial = True

    def __init__(self, always: Sequence[int], rest: Selector) -> None:
        super().__init__()
        self.always, self.rest = tuple(always), rest
        if rest.by_expert or len(set(self.always)) < len(self.always):
            raise OptionError(
                f"force experts {self.always}", found="a selector by expert, or a repeated expert", do="choose others"
            )
        self.taps, self.batch_invariant = rest.taps, rest.batch_invariant

    def slots(self, num_experts: int) -> int:
        """Return the forced ones and those of the rest."""
        return len(self.always) + self.rest.slots(num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return the forced experts, then the others."""
        forced = torch.tensor(self.always, device=scores.device)
        free = scores.index_fill(-1, forced, float("-inf"))
        others = self.rest(free, x, *taps)
        # Where fewer are free than the rest wants, it takes forced ones again.
        again = (others.unsqueeze(-1) == forced).any(-1)
        others = torch.where(again, scores.shape[-1], others)
        return torch.cat([forced.expand(*others.shape[:-1], -1), others], -1)


def best_of(scores: Tensor, chosen: Tensor, width: int) -> Tensor:
    """Return the ``width`` best of the chosen experts ``[..., N]`` (bool), best first, empty slots last."""
    ranked = top_k(scores.masked_fill(~chosen, float("-inf")), width)
    return torch.where(chosen.gather(-1, ranked), ranked, scores.shape[-1])


def gumbel(like: Tensor) -> Tensor:
    """Return Gumbel noise in the shape and dtype of ``like``."""
    # By rand: AOTAutograd takes two draws by exponential_ for one, and their difference would be no noise at all.
    u = torch.rand_like(like).clamp_min(torch.finfo(like.dtype).tiny)
    return -(-u.log()).log()


def stateless(x: Tensor) -> bool:
    """Tell whether a moving average must stay: in an export or trace, and when a checkpoint recomputes."""
    return _only_mathematics(x) or _recomputing()


def share(tokens: int, factor: float, parts: int, most: int) -> int:
    """Return ``⌈factor · tokens / parts⌉``, at most ``most``, in whole numbers, so that sizes may be symbolic."""
    share = Fraction(factor).limit_denominator(10_000)
    wanted = -((-tokens * share.numerator) // (share.denominator * parts))
    return torch.sym_min(wanted, most)  # type: ignore[no-untyped-call,no-any-return]

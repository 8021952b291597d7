"""Mixture of depths with a capacity that follows the noise level: fewer tokens pass a block where fewer are needed.

Legend: B samples, T tokens, D width, C = ⌊capacity·T⌋ tokens at most, n intervals of the timestep.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.depths import TokenRouter
from moefx.routing.precision import at_least_float32
from moefx.routing.tokens import gather_tokens


class TimedSelection(NamedTuple):
    """As `Selection`; ``passes`` [B, C], bool, says which of the tokens pass at the timestep of their sample."""

    tokens: Tensor
    weights: Tensor
    passes: Tensor


class TimedTokenRouter(TokenRouter):
    """A `TokenRouter` of whose C tokens the best ``⌈share(t)·C⌉`` pass.

    C tokens go through the block at every timestep, so that shapes do not depend on it and every sample of a batch has
    its own share; of those beyond the share nothing is kept (`passing`). Among the C they are still keys and values of
    the others. Where all tokens are keys, those beyond the share have no effect at all, and `moefx.specialise` leaves
    them out: one static number of tokens per interval.

    Args:
        dim: D.
        shares: share(t) in (0, 1] for equal intervals of the timestep, from t = 0 up.
        steps: timesteps are in [0, steps); 1 for flow models that pass σ.
        alone: a token's result does not depend on which others pass: all of them are keys.
        options: of `TokenRouter`.
    """

    numerators: Tensor

    def __init__(
        self, dim: int, shares: Sequence[float], *, steps: float = 1000.0, alone: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, **options)
        if not shares or not all(0 < share <= 1 for share in shares):
            raise OptionError(f"tokens over time {list(shares)}", found="no share, or out of range", do="use (0, 1]")
        self.steps, self.alone = steps, alone
        # Integers, so that a static model counts the same tokens.
        self.denominator = 10_000
        counts = [max(1, round(Fraction(share).limit_denominator(10_000) * self.denominator)) for share in shares]
        self.register_buffer("numerators", torch.tensor(counts, device=self.weight.device), persistent=False)

    @property
    def taps(self) -> tuple[str, ...]:
        """What it reads besides the tokens."""
        return ("timestep",)

    def interval(self, timestep: Tensor) -> Tensor:
        """Return the interval of raw timesteps ``[B]`` or ``[]``, as ``[B]`` or ``[1]``."""
        if timestep.ndim > 1:
            raise InputError(
                "cut tokens by the timestep",
                found=f"a timestep of shape {tuple(timestep.shape)}",
                do="pass raw timesteps [B], not an embedding",
            )
        count = len(self.numerators)
        t = timestep.reshape(-1).to(at_least_float32(timestep))
        return (t * (count / self.steps)).floor().clamp(0, count - 1).long()

    def forward(self, x: Tensor, timestep: Tensor) -> TimedSelection:  # type: ignore[override]
        """Return the C best tokens of each sample of ``x`` ``[B, T, D]``, all weights, and who passes."""
        z, most = self.logits(x), self.tokens(x.shape[1])
        chosen, rank = self._best_first(z)[..., :most].sort(dim=-1)
        count_B = _share_of(most, self.numerators[self.interval(timestep)], self.denominator)
        passes = rank < count_B.unsqueeze(-1)
        if self.training:
            self._remember(z, chosen, passes.expand(chosen.shape).long())
        return TimedSelection(chosen, self._weights(z), passes)

    @property
    def deciding(self) -> tuple[int, ...]:
        """The timestep, if it decides about shapes alone; see `moefx.routing.static`."""
        return (1,) if self.alone else ()

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the share of the interval, and a router of so many tokens over the same weights."""
        numerator = int(self.numerators[self.interval(values[0])][0])
        return numerator, shared.setdefault(numerator, _AtOneShare(self, numerator))


class _AtOneShare(nn.Module):
    """A `TimedTokenRouter` at one interval of the timestep."""

    same_arguments = True

    def __init__(self, router: TimedTokenRouter, numerator: int) -> None:
        super().__init__()
        # A shallow copy: the parameters are those of the router.
        self.router, self.numerator = copy.copy(router), numerator

    def forward(self, x: Tensor, *_: Any) -> TimedSelection:
        """Return the tokens that pass, all weights, and that all of them pass."""
        router = self.router
        z = router.logits(x)
        count = _share_of(router.tokens(x.shape[1]), self.numerator, router.denominator)
        chosen = router._best_first(z)[..., :count].sort(dim=-1).values
        return TimedSelection(chosen, router._weights(z), torch.ones_like(chosen, dtype=torch.bool))

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"share={self.numerator / self.router.denominator:g}"


def _share_of(most: Any, numerator: Any, denominator: int) -> Any:
    """Return ``⌈most · numerator / denominator⌉`` of integers, or of tensors of integers."""
    return (most * numerator + denominator - 1) // denominator


def passing(after: Tensor, before: Tensor, index: Tensor, passes: Tensor) -> Tensor:
    """Return ``after`` ``[B, C, D]`` for the tokens that pass, for the others ``before`` ``[B, T, D]`` there."""
    return torch.where(passes.unsqueeze(-1), after, gather_tokens(before, index).to(after.dtype))

"""An expert of their own for samples without a condition (ProMoE, arXiv 2510.24711, its first routing step).

Which samples those are is said, never guessed: by the label that stands for none, or by the caller.

Legend: B samples, T tokens, N experts with the unconditional one, which is the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.precision import KeepFloat32
from moefx.routing.selectors import Selector


class UnconditionalRouter(KeepFloat32):
    """A router over N − 1 experts, and a logit of 1 for the last: with gates that are logits, or 1, its weight is 1."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.inner = router
        self.num_experts = int(router.num_experts) + 1  # type: ignore[arg-type]
        self.taps, self.reads = tuple(getattr(router, "taps", ())), getattr(router, "reads", ("token",))

    @property
    def scorer(self) -> Any:
        """The scorer of the other experts."""
        return self.inner.scorer

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return logits ``[B, ..., N]``."""
        logits: Tensor = self.inner(x, *taps)
        return torch.cat([logits, torch.ones_like(logits[..., :1])], -1)


class Unconditional(Selector):
    """All tokens of unconditional samples to expert N − 1 alone, the others by ``rest`` among the first N − 1.

    A sample is unconditional where its label is ``null_label``, or without one where the caller says so:
    ``given(model, unconditional=mask)`` with a bool mask ``[B]``. While nobody says so, every sample is conditional.

    Args:
        rest: chooses among the N − 1 other experts.
        null_label: the label that stands for none; None to be told by the caller.
    """

    partial = True

    def __init__(self, rest: Selector, *, null_label: int | None = None) -> None:
        super().__init__()
        if rest.by_expert:
            raise OptionError(
                "an unconditional expert", found="a selector by expert", do="use one that chooses for tokens"
            )
        self.rest, self.null_label = rest, null_label
        self.batch_invariant = rest.batch_invariant
        self.taps = rest.taps if null_label is None else tuple(dict.fromkeys((*rest.taps, "label")))
        self.takes = ("unconditional",) if null_label is None else ()
        self.given: dict[str, Tensor] = {}

    def slots(self, num_experts: int) -> int:
        """Return those of the rest."""
        return self.rest.slots(num_experts - 1)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``; an unconditional token has expert N − 1 and empty slots."""
        last = scores.shape[-1] - 1
        values = dict(zip(self.taps, taps, strict=True))
        chosen: Tensor = self.rest(scores[..., :last], x, *(values[name] for name in self.rest.taps))
        if self.rest.partial:
            chosen = torch.where(chosen < last, chosen, last + 1)
        mask = self._mask(values)
        if mask is None:
            return chosen
        if mask.shape != (x.shape[0],):
            raise InputError(
                "send unconditional samples to their expert",
                found=f"a mask of shape {tuple(mask.shape)} for {x.shape[0]} samples",
                do="give one truth value per sample",
            )
        own = torch.where(torch.arange(chosen.shape[-1], device=chosen.device) == 0, last, last + 1)
        return torch.where(mask.reshape(-1, *[1] * (chosen.ndim - 1)), own, chosen)

    def _mask(self, values: dict[str, Tensor]) -> Tensor | None:
        if self.null_label is not None:
            return values["label"].reshape(-1) == self.null_label
        return self.given.get("unconditional")

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"null_label={self.null_label}"

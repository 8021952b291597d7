"""Budgets that depend on the timestep: how many experts a token gets, or tokens an expert takes, at each noise level.

Legend: B samples, T tokens of a sample, N experts (or tied groups), K slots per token, C tokens per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moefx.errors import InputError, OptionError
from moefx.routing.precision import at_least_float32
from moefx.routing.selectors import Selector


class OverTime(Selector):
    """What another selector chose, best first, cut to the share of its slots that the timestep allows.

    ``⌈share(t) · K⌉`` experts of a token stay, or of each expert ``⌈share(t) · C⌉`` tokens of a sample; the rest of the
    slots is empty, so shapes do not depend on the timestep, and each sample of a batch has its own share.

    Args:
        rest: a selector of the top-k kind, or expert choice per sample.
        shares: in (0, 1], for equal intervals of the timestep, from t = 0 up.
        steps: timesteps are in [0, steps); 1 for flow models that pass σ.
    """

    partial = True
    shares: Tensor

    def __init__(self, rest: Selector, shares: Sequence[float], *, steps: float = 1000.0) -> None:
        super().__init__()
        if not shares or not all(0 < share <= 1 for share in shares):
            raise OptionError(f"slots over time {list(shares)}", found="no share, or out of range", do="use (0, 1]")
        if rest.by_expert and not rest.batch_invariant:
            raise OptionError(
                "slots over time with expert choice", found="tokens of several samples in a pool", do="pool='sample'"
            )
        self.rest, self.steps = rest, steps
        self.by_expert, self.batch_invariant = rest.by_expert, rest.batch_invariant
        self.taps = tuple(dict.fromkeys((*rest.taps, "timestep")))
        self.register_buffer("shares", torch.tensor(list(shares), dtype=torch.float32))

    def slots(self, num_experts: int) -> int:
        """Return those of the rest."""
        return self.rest.slots(num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return what the rest returned, with empty slots behind the share."""
        values = dict(zip(self.taps, taps, strict=True))
        chosen: Tensor = self.rest(scores, x, *(values[name] for name in self.rest.taps))
        share = self._share(values["timestep"], x.shape[0])
        if self.by_expert:
            tokens = x.shape[:-1].numel()
            per_sample = chosen.view(chosen.shape[0], x.shape[0], -1)
            kept = self._kept(share.view(1, -1, 1), per_sample.shape[-1], chosen.device)
            return torch.where(kept, per_sample, tokens).flatten(1)
        kept = self._kept(share.view(-1, *[1] * (x.ndim - 1)), chosen.shape[-1], chosen.device)
        return torch.where(kept, chosen, scores.shape[-1])

    def _share(self, timestep: Tensor, samples: int) -> Tensor:
        if timestep.ndim > 1:
            raise InputError(
                "cut slots by the timestep",
                found=f"a timestep of shape {tuple(timestep.shape)}",
                do="pass raw timesteps [B], not an embedding",
            )
        t = timestep.reshape(-1).to(at_least_float32(timestep))
        count = self.shares.shape[0]
        index = (t * (count / self.steps)).floor().clamp(0, count - 1).long()
        return self.shares[index].expand(samples)

    @staticmethod
    def _kept(share: Tensor, slots: int, device: torch.device) -> Tensor:
        # The small number undoes rounding: 0.3 · 10 is a little more than 3.
        return torch.arange(slots, device=device) < (share * slots - 1e-4).ceil()

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"steps={self.steps}"

"""Selectors in which experts choose tokens: every expert is equally busy, and a token may be served by none.

Which tokens compete is the one difference between them: those of a sample, of a fixed number of tokens, or of the
batch. Only the first gives a sample the same result whatever else is in its batch.

Legend: B samples, T tokens of a sample, N experts (or tied groups), C tokens per expert, P pools, S tokens of a pool.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.selectors import Selector, best_of, gumbel, share, stateless


class ExpertChoice(Selector):
    """Each expert takes its best ``⌈capacity · S / N⌉`` tokens of every pool (arXiv 2202.09368).

    ``capacity`` is the mean number of experts per token: 0 serves nobody, N gives every token every expert.

    Args:
        capacity: mean experts per token.
        pool: ``sample``, ``batch``, or the number of tokens of a pool (they are counted over the flattened batch).
        noise: while training, add the difference of two Gumbel draws to the scores (MoMa, arXiv 2407.21770).
    """

    by_expert = True
    partial = True

    def __init__(self, capacity: float = 1.0, *, pool: str | int = "sample", noise: bool = False) -> None:
        super().__init__()
        if capacity < 0 or not (pool in ("sample", "batch") or (isinstance(pool, int) and pool > 0)):
            raise OptionError(
                f"expert choice with capacity {capacity} per {pool}",
                found="out of range",
                do="capacity >= 0, pool 'sample', 'batch' or a number of tokens",
            )
        self.capacity, self.pool, self.noise = capacity, pool, noise
        self.batch_invariant = pool == "sample"

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return token indices ``[N, C]`` into the flattened tokens of ``x``, each expert's best first."""
        experts = scores.shape[-1]
        scores = scores.expand(*x.shape[:-1], experts)
        if self.noise and self.training:
            scores = scores + gumbel(scores) - gumbel(scores)
        pools_PSN = self._pools(scores)
        count, size = pools_PSN.shape[0], pools_PSN.shape[1]
        take = share(size, self.capacity, experts, size)
        ranked_PSN = pools_PSN.sort(dim=1, descending=True, stable=True).indices
        base = torch.arange(count, device=scores.device).view(-1, 1, 1) * size
        return (ranked_PSN[:, :take] + base).permute(2, 0, 1).reshape(experts, -1)

    def _pools(self, scores: Tensor) -> Tensor:
        """Return the scores as ``[P, S, N]``."""
        if self.pool == "sample":
            return scores.flatten(1, -2) if scores.ndim > 2 else scores.unsqueeze(0)
        flat = scores.reshape(-1, scores.shape[-1])
        if self.pool == "batch":
            return flat.unsqueeze(0)
        assert isinstance(self.pool, int)
        # Padding takes part with the lowest score; its indices lie behind the last token, which means "none".
        padded = F.pad(flat, (0, 0, 0, -flat.shape[0] % self.pool), value=float("-inf"))
        return padded.view(padded.shape[0] // self.pool, self.pool, padded.shape[1])

    def extra_repr(self) -> str:
        """Describe the selector in ``print(model)``."""
        return f"capacity={self.capacity}, pool={self.pool!r}"


class PredictedChoice(ExpertChoice):
    """Expert choice over the batch while training; else a predictor decides for each token alone (DiffMoE, 2503.14487).

    A small network on the token (cut off from the gradient) learns which experts take it; expert e's threshold is a
    moving average of the prediction of its last accepted token. In evaluation a token goes to every expert whose
    prediction exceeds the threshold. The released code lets the predictor only count the tokens and then ranks the
    whole batch by gate, which makes a sample depend on its batch; here it does not. The average is corrected for its
    start at zero.

    Args:
        dim: D.
        num_experts: N.
        capacity: mean experts per token while training.
        momentum: of the thresholds.
        generator: source of the predictor's start.
    """

    cut: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        capacity: float = 1.0,
        *,
        momentum: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(capacity, pool="batch")
        self.momentum = momentum
        layers = nn.Linear(dim, dim), nn.Linear(dim, num_experts)
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        self.predictor = nn.Sequential(layers[0], nn.SiLU(), layers[1])
        self.register_buffer("cut", torch.zeros(num_experts))
        self.register_buffer("steps", torch.zeros(()))

    @property
    def by_expert(self) -> bool:  # type: ignore[override]
        """By expert while training, by token otherwise."""
        return self.training

    @property
    def batch_invariant(self) -> bool:
        """While training the tokens of a batch compete."""
        return not self.training

    @batch_invariant.setter
    def batch_invariant(self, value: bool) -> None:
        """Follow ``training`` alone."""

    def predict(self, x: Tensor) -> Tensor:
        """Return the logits ``[..., N]`` of being taken; no gradient reaches ``x``."""
        dtype = next(self.predictor.parameters()).dtype
        logits: Tensor = self.predictor(x.detach().to(dtype))
        return logits.to(torch.float64 if logits.element_size() == 8 else torch.float32)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[N, C]`` token indices while training, ``[..., N]`` expert indices otherwise."""
        if not self.training:
            chosen = self.predict(x).sigmoid() > self.cut
            return best_of(scores.expand(chosen.shape), chosen, scores.shape[-1])
        tokens_NC = super().forward(scores, x)
        if tokens_NC.shape[1] and not stateless(x):
            with torch.no_grad():
                predicted = self.predict(x).sigmoid().reshape(-1, scores.shape[-1])
                last = predicted.sort(0, descending=True).values[tokens_NC.shape[1] - 1]
                self.steps.add_(1)
                weight = (1 - self.momentum) / (1 - self.momentum**self.steps)
                self.cut.add_(weight * (last.to(self.cut.dtype) - self.cut))
        return tokens_NC


def to_token_choice(tokens_NC: Tensor, tokens: int) -> Tensor:
    """Return by-expert indices as expert indices ``[tokens, N]``, slot e holding e or, where it was not chosen, N."""
    experts = tokens_NC.shape[0]
    taken = torch.zeros(experts, tokens + 1, dtype=torch.bool, device=tokens_NC.device)
    taken = taken.scatter(1, tokens_NC.clamp(max=tokens), True)[:, :tokens].T
    return torch.where(taken, torch.arange(experts, device=tokens_NC.device), experts)

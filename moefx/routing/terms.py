"""Auxiliary terms that some systems add to the balance and z losses: functions of one routing decision, by name.

====================  ==============================================================  ==================================
term                  value                                                           used by
====================  ==============================================================  ==================================
entropy               mean −Σ p log p                                                 Dynamic MoE (arXiv 2403.07652)
importance            E Σ_e mean(p_e) mean(g_e)                                       MoDE (arXiv 2412.12953)
sequence_balance      mean over samples of E Σ_e f_e P_e                              DeepSeek-V3 (arXiv 2412.19437)
weighted_balance      Σ_e η_e f_e P_e, η = 1 for FFNs, τ for cheap experts            MoE++ (arXiv 2410.07348)
contrastive           InfoNCE between prototypes and means of their tokens            ProMoE (arXiv 2510.24711)
predictor             BCE of the predictor with what experts chose                    DiffMoE (arXiv 2503.14487)
similarity            router similarity: overload and experts always chosen together  Expert Race (arXiv 2503.16057)
====================  ==============================================================  ==================================

f_e counts assignments with Σ f = 1 (``weighted_balance``: per token, Σ f = K), constant; the gradient goes through P.

Legend: T tokens, N experts (or tied groups), K slots.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.errors import OptionError, nearest
from moefx.routing.losses import at_least_one, load_counts, mean_over_tokens
from moefx.routing.losses import entropy as mean_entropy
from moefx.routing.normalise import probabilities

if TYPE_CHECKING:
    from moefx.routing.moe import Decision, Loss

BUILT_IN = ("balance", "z")
TEMPERATURE = 0.07  # of the contrastive term


def entropy(decision: Decision) -> Tensor:
    """Return the mean entropy of the router's distribution in nats."""
    return mean_entropy(_probabilities(decision))


def importance(decision: Decision) -> Tensor:
    """Return ``E Σ_e mean(p_e) mean(g_e)``; unlike in the balance loss the gradient goes through both."""
    gates_TN = spread(decision.gates, decision.groups, decision.logits.shape[-1])
    p = mean_over_tokens(_probabilities(decision))
    return p.numel() * (p * mean_over_tokens(gates_TN)).sum()


def weighted_balance(decision: Decision) -> Tensor:
    """Return ``Σ_e η_e f_e P_e`` with f_e the fraction of tokens that chose e; η the experts' ``balance_weights``."""
    p = mean_over_tokens(_probabilities(decision))
    counts = load_counts(decision.groups, p.numel())
    eta: Tensor = decision.layer.experts.balance_weights  # type: ignore[assignment]
    return (eta.to(p) * (counts / at_least_one(decision.groups.shape[0])).to(p) * p).sum()


def sequence_balance(decision: Decision) -> Tensor:
    """Return the balance loss within each sample, averaged over samples."""
    n, samples = decision.logits.shape[-1], decision.samples
    tokens = decision.logits.numel() // n // at_least_one(samples)
    p = _probabilities(decision).reshape(samples, tokens, n)
    groups = decision.groups.reshape(samples, tokens * decision.groups.shape[-1])
    taken = torch.zeros(samples, n + 1, dtype=p.dtype, device=p.device)
    taken = taken.scatter_add(1, groups.clamp(max=n), torch.ones_like(groups, dtype=p.dtype))[:, :n]
    fractions = taken / taken.sum(1, keepdim=True).clamp(min=1)
    return n * mean_over_tokens((fractions * p.sum(1) / at_least_one(tokens)).sum(1))


def contrastive(decision: Decision) -> Tensor:
    """Return InfoNCE between each used expert's prototype and the mean of its tokens, against the other means.

    ``mean_i −log exp(cos(p_i, m_i)/τ) / Σ_j exp(cos(p_i, m_j)/τ)`` over the experts that have tokens, τ = 0.07.
    """
    prototypes: Tensor = decision.layer.router.scorer.prototypes  # type: ignore[union-attr,assignment]
    n = prototypes.shape[0]  # an expert without a prototype, for unconditional samples, has no part in it
    chosen_TN = spread(torch.ones_like(decision.gates), decision.groups, n)
    x = decision.x.to(chosen_TN.dtype)
    counts = chosen_TN.sum(0)
    means = (chosen_TN.T @ x) / counts.clamp(min=1).unsqueeze(-1)
    used = counts > 0
    cosine = F.normalize(prototypes.to(x.dtype), dim=-1) @ F.normalize(means, dim=-1).T / TEMPERATURE
    cosine = cosine.masked_fill(~used, torch.finfo(cosine.dtype).min)
    losses = -cosine.log_softmax(-1).diagonal()
    return torch.where(used, losses, 0).sum() / used.sum().clamp(min=1)


def predictor(decision: Decision) -> Tensor:
    """Return the binary cross-entropy of the selector's predictor with what the experts chose, averaged."""
    n = decision.logits.shape[-1]
    chosen = spread(torch.ones_like(decision.gates), decision.groups, n)
    predicted = decision.layer.selector.predict(decision.x)  # type: ignore[operator]
    return mean_over_tokens(
        F.binary_cross_entropy_with_logits(predicted, chosen.to(predicted), reduction="none")
    ).mean()


def similarity(decision: Decision) -> Tensor:
    """Return ``mean(W ⊙ PᵀP)/T`` with W from MᵀM, M the selection: diagonal and off-diagonal each normalised to mean 1.

    Penalises experts that are chosen too often and pairs that are always chosen together. The paper's constants are not
    published; here both parts have mean weight 1.
    """
    p = _probabilities(decision)
    n = p.shape[-1]
    chosen = spread(torch.ones_like(decision.gates), decision.groups, n).to(p)
    together, mass = chosen.T @ chosen, (p.T @ p) / at_least_one(p.shape[0])
    eye = torch.eye(n, dtype=torch.bool, device=p.device)
    diagonal, rest = together.masked_fill(~eye, 0), together.masked_fill(eye, 0)
    tiny = torch.finfo(p.dtype).tiny
    weight = diagonal * n / diagonal.sum().clamp(min=tiny) + rest * (n * n - n) / rest.sum().clamp(min=tiny)
    return (weight * mass).mean()


TERMS: dict[str, Loss] = {
    "contrastive": contrastive,
    "entropy": entropy,
    "importance": importance,
    "predictor": predictor,
    "sequence_balance": sequence_balance,
    "similarity": similarity,
    "weighted_balance": weighted_balance,
}


def check_terms(names: list[str]) -> None:
    """Raise `OptionError` unless every name is a built-in term or one of `TERMS`."""
    for name in names:
        if name not in TERMS and name not in BUILT_IN:
            raise OptionError(f"the loss term {name!r}", found="no such term", do=nearest(name, [*BUILT_IN, *TERMS]))


def spread(values: Tensor, groups: Tensor, num_experts: int) -> Tensor:
    """Return ``[T, N]`` with the values ``[T, K]`` at their experts and 0 elsewhere; empty slots are dropped."""
    out = values.new_zeros((values.shape[0], num_experts + 1))
    return out.scatter(1, groups.clamp(max=num_experts), values)[:, :num_experts]


def _probabilities(decision: Decision) -> Tensor:
    return probabilities(decision.logits, decision.layer.mode)

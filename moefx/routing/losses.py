"""Balance losses and the statistics they are made of, as functions of logits and selections.

Legend: T tokens, E experts, K selected per token. f_e is the fraction of all T·K assignments that go to expert e, so Σ
f = 1; P_e the mean over tokens of the router's probability. No value leaves the device.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def load_counts(experts: Tensor, num_experts: int) -> Tensor:
    """Return the number of assignments of each expert ``[E]``, float32, from indices ``[T, K]``.

    Indices outside [0, E) mark slots without an expert and are not counted.
    """
    known = (experts >= 0) & (experts < num_experts)
    index = torch.where(known, experts, num_experts).reshape(-1)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=experts.device)
    return counts.scatter_add(0, index, torch.ones_like(index))[:num_experts].to(torch.float32)


def load_fractions(experts: Tensor, num_experts: int) -> Tensor:
    """Return f ``[E]``, float32, from expert indices ``[T, K]``; zeros if there are no assignments."""
    counts = load_counts(experts, num_experts)
    return counts / counts.sum().clamp(min=1)


def mean_over_tokens(values: Tensor, axis: int = 0) -> Tensor:
    """Return the mean over an axis; zero, not NaN, if there are no tokens."""
    return values.sum(axis) / at_least_one(values.shape[axis])


def at_least_one(count: int) -> int:
    """Return a number of tokens or samples to divide by, an int or a symbolic one."""
    return cast(int, torch.sym_max(count, 1))  # type: ignore[no-untyped-call]  # max() would guard on a symbolic size


def switch_balance(fractions: Tensor, mean_probabilities: Tensor) -> Tensor:
    """Return ``E · Σ_e f_e P_e`` (Switch Transformer, arXiv 2101.03961): 1 when balanced, E when one expert takes all.

    f is constant; the gradient goes through P. Papers that count f per token (Σ f = K) have K times this value.
    """
    return fractions.numel() * (fractions.detach() * mean_probabilities).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of ``logsumexp(logits)²`` (ST-MoE, arXiv 2202.08906); ``logits`` is ``[T, E]``."""
    return mean_over_tokens(logits.logsumexp(-1).square())


def entropy(probabilities: Tensor) -> Tensor:
    """Return the mean over tokens of ``−Σ p log p`` in nats: 0 for a decided router, log E for an undecided one."""
    return mean_over_tokens(torch.special.entr(probabilities).sum(-1))

"""Which experts a token goes to. Every selector is deterministic: among equal scores the lowest expert index wins.

Legend: T tokens, E experts, N tied groups of G experts (E = N·G), K selected; leading axes may be any shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefx.errors import OptionError


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` highest scores, best first, ties to the lowest index.

    ``torch.topk`` promises no order among equal scores and gives different ones on CPU and GPU; a stable sort does not.

    Args:
        scores: ``[..., E]``; −inf takes an expert out as long as ``k`` others remain.
        k: 1 ≤ k ≤ E.

    Returns:
        ``[..., k]``, int64.

    Raises:
        OptionError: ``k`` is out of range.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise OptionError(f"select the top {k}", found=f"{scores.shape[-1]} experts", do="choose 1 <= k <= experts")
    if k == 1:
        return scores.argmax(-1, keepdim=True)  # documented to return the first maximum
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def group_limited_top_k(scores: Tensor, k: int, *, groups: int, keep: int, best: int = 2) -> Tensor:
    """Return the top ``k`` experts among the ``keep`` best of ``groups`` equal groups (DeepSeek-V3, arXiv 2412.19437).

    A group scores the sum of its ``best`` highest scores. Experts of the other groups are masked by −inf, not by 0,
    which a negative score could lose against.

    Args:
        scores: ``[..., E]``, E divisible by ``groups``; group g holds experts ``g·E/groups`` and following.
        k: at most ``keep · E / groups``.
        groups: number of groups.
        keep: groups that stay eligible.
        best: scores of a group that count.

    Returns:
        ``[..., k]``, int64.
    """
    experts = scores.shape[-1]
    if experts % groups or not 1 <= keep <= groups or k > keep * (experts // groups):
        raise OptionError(
            f"select {k} experts within {keep} of {groups} groups",
            found=f"{experts} experts",
            do="make experts divisible by groups, keep <= groups and k <= keep * experts / groups",
        )
    scores_GN = scores.reshape(*scores.shape[:-1], groups, experts // groups)
    members = min(best, experts // groups)
    group_scores = scores_GN.sort(dim=-1, descending=True, stable=True).values[..., :members].sum(-1)
    kept = top_k(group_scores, keep)
    eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, kept, True)
    masked = scores_GN.masked_fill(~eligible.unsqueeze(-1), float("-inf"))
    return top_k(masked.flatten(-2), k)


def expand_groups(groups: Tensor, gates: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Replace each selected group by its ``size`` member experts, every member with the gate of its group.

    Group g holds experts ``g·size … g·size + size − 1``. If these are the neuron shards of one FFN, the sum of the
    members *is* that FFN, so no further factor is needed. Selecting groups instead of experts with tied router rows
    means no ties to break and no duplicated rows to multiply; a zero router stays exact.

    Args:
        groups: ``[..., K]``, int64.
        gates: ``[..., K]``.
        size: G ≥ 1.

    Returns:
        expert indices and gates, both ``[..., K·G]``.
    """
    if size == 1:
        return groups, gates
    members = torch.arange(size, device=groups.device)
    experts = (groups.unsqueeze(-1) * size + members).flatten(-2)
    return experts, gates.repeat_interleave(size, dim=-1)

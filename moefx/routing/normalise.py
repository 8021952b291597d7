"""Gates from router logits: the one place that decides what a selected expert is multiplied by.

Legend: T tokens, E experts (or tied groups of experts), K selected per token; leading axes may be any shape.
The modes, with S the selected set, l the logits, p = softmax(l), σ the logistic function:

====================  =============================  ========  =====================================================
mode                  w_e for e in S                 Σ_S w     used by
====================  =============================  ========  =====================================================
topk_softmax          softmax over S of l            1         JetMoE, SegMoE, Uni-MoE
softmax_topk_renorm   p_e / Σ_S p                    1         Mixtral, MoDE, RMoE (equal to topk_softmax)
softmax_topk          p_e                            < 1       Switch, DiT-MoE, HiDream, DeepSeekMoE
sigmoid_topk_renorm   σ(l_e) / Σ_S σ(l)              1         DeepSeek-V3, DSMoE
sigmoid_topk          σ(l_e)                         any       MoMa
unit                  1                              K         MoEfication, D2DMoE, EMoE
soft                  p_e, S = all experts           1         BAM, Remix-DiT
one_plus_su           1 + p_e·u_e, u learnt from 0   K at u=0  CMoE
ste                   1 + p_e − stopgrad(p_e)        K         moefx: value 1 with the gradient of p
sigmoid_ste           1 + σ(l_e) − stopgrad(σ(l_e))  any       Gumbel-sigmoid switches (DyDiT)
identity              l_e                            any       Expert Race, ProMoE (cosines), TimeStep Master
one_plus_tanh         1 + α·tanh(l_e), α = 0.2       K at l=0  p-MoD
====================  =============================  ========  =====================================================

"× k", "× s" and "route scale" are ``scale``. Where experts choose tokens, S is the experts that chose the token, so
``softmax_topk`` is the raw affinity of EC-DiT and ``softmax_topk_renorm`` the per-token renormalisation of Nucleus.

A copied FFN is reproduced exactly where Σ_S w = 1. Under the three renormalised modes identical experts send no
gradient to the router at all, and with K = 1 they never do; ``ste`` and ``softmax_topk`` always do.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.errors import OptionError, nearest

MODES: Final = (
    "topk_softmax",
    "softmax_topk_renorm",
    "softmax_topk",
    "sigmoid_topk_renorm",
    "sigmoid_topk",
    "unit",
    "soft",
    "one_plus_su",
    "ste",
    "sigmoid_ste",
    "identity",
    "one_plus_tanh",
)
TANH_SCALE: Final = 0.2
SUM_TO_ONE: Final = frozenset({"topk_softmax", "softmax_topk_renorm", "sigmoid_topk_renorm", "soft"})


def normalise(
    logits: Tensor,
    experts: Tensor,
    mode: str,
    *,
    scale: float = 1.0,
    u: Tensor | None = None,
    partial: bool = False,
) -> Tensor:
    """Return the gates of the selected experts.

    Args:
        logits: ``[..., E]``, float32 or float64, without any selection bias.
        experts: ``[..., K]``, int64 expert indices.
        mode: one of `MODES`.
        scale: multiplies every gate (``route_scale``; K for the "renorm × k" of mixture-of-heads).
        u: ``[E]``, the learnt scale of ``one_plus_su``; no other mode takes it.
        partial: an index E or higher marks a slot without an expert: it gets 0 and no share of what is renormalised.

    Returns:
        ``[..., K]`` in the dtype of ``logits``.

    Raises:
        OptionError: an unknown mode, ``u`` where it has no meaning, or ``soft`` with fewer than all experts.
    """
    check_mode(mode)
    empty = experts >= logits.shape[-1] if partial else None
    known = experts if empty is None else experts.masked_fill(empty, 0)
    gates = _gates(logits, known, mode, u, empty)
    if empty is not None:
        gates = gates.masked_fill(empty, 0)
    return gates if scale == 1.0 else gates * scale


def _gates(logits: Tensor, experts: Tensor, mode: str, u: Tensor | None, empty: Tensor | None) -> Tensor:
    if (u is not None) != (mode == "one_plus_su"):
        raise OptionError(f"normalise with mode {mode!r}", found=f"u is {u}", do="give u to one_plus_su and to it only")
    if mode in ("topk_softmax", "softmax_topk_renorm"):
        # Both are the softmax over the selected logits. p_S / Σp_S would be 0/0 when a selection bias picks experts
        # whose p underflows.
        return _without(logits.gather(-1, experts), empty).softmax(-1)
    if mode == "sigmoid_topk_renorm":
        # softmax(log σ(l)) = σ(l)/Σσ(l): sums to one even where every σ underflows; an epsilon in the denominator would
        # not.
        return _without(F.logsigmoid(logits.gather(-1, experts)), empty).softmax(-1)
    if mode == "sigmoid_topk":
        return logits.gather(-1, experts).sigmoid()
    if mode == "unit":
        return torch.ones_like(logits.gather(-1, experts))
    if mode == "identity":
        return logits.gather(-1, experts)
    if mode == "one_plus_tanh":
        return 1 + TANH_SCALE * logits.gather(-1, experts).tanh()
    if mode == "sigmoid_ste":
        chosen = logits.gather(-1, experts).sigmoid()
        return 1 + (chosen - chosen.detach())
    return _softmax_gates(logits, experts, mode, u)


def _without(logits: Tensor, empty: Tensor | None) -> Tensor:
    """Take empty slots out of a softmax; a lowest finite number, since a row may be all empty."""
    return logits if empty is None else logits.masked_fill(empty, torch.finfo(logits.dtype).min)


def _softmax_gates(logits: Tensor, experts: Tensor, mode: str, u: Tensor | None) -> Tensor:
    if mode == "soft" and experts.shape[-1] != logits.shape[-1]:
        raise OptionError(
            "normalise with mode 'soft'",
            found=f"{experts.shape[-1]} of {logits.shape[-1]} experts selected",
            do="select all experts, or use 'softmax_topk'",
        )
    chosen = logits.softmax(-1).gather(-1, experts)
    if mode == "ste":
        return 1 + (chosen - chosen.detach())  # in this order the value is 1 to the bit; (1 + p) - p is not
    if u is not None:
        return 1 + chosen * u.to(chosen.dtype)[experts]
    return chosen


def probabilities(logits: Tensor, mode: str) -> Tensor:
    """Return the router's distribution over experts ``[..., E]``, for balance losses and statistics.

    Softmax of the logits, or for the sigmoid modes σ(l)/Σσ(l).
    """
    return F.logsigmoid(logits).softmax(-1) if mode.startswith("sigmoid") else logits.softmax(-1)


def selection_scores(logits: Tensor, mode: str, bias: Tensor | None, *, across_tokens: bool = False) -> Tensor:
    """Return what the selector ranks ``[..., E]``: the logits, or with a bias ``[E]`` the scores plus that bias.

    Within a token logits and scores have one order. ``across_tokens``, where experts choose tokens, they have not:
    there the scores are ranked (the affinities of EC-DiT, arXiv 2410.02098), except under ``identity``.

    The bias of auxiliary-loss-free balancing is added to the *scores* (σ or softmax), never to the logits and never to
    the gates (DeepSeek-V3, arXiv 2412.19437). A bias of −inf takes an expert out of the selection.
    """
    if bias is None and (not across_tokens or mode == "identity"):
        return logits
    scores = logits.sigmoid() if mode.startswith("sigmoid") else logits.softmax(-1)
    return scores if bias is None else scores + bias


def default_mode(num_experts: int, k: int) -> str:
    """Return the mode that is exact on copies and still trains its router: ``ste`` for k = 1, else renormalised."""
    return "ste" if k == 1 and num_experts > 1 else "softmax_topk_renorm"


def check_mode(mode: str) -> None:
    """Raise `OptionError` unless ``mode`` is one of `MODES`."""
    if mode not in MODES:
        raise OptionError(f"normalisation mode {mode!r}", found="no mode of that name", do=nearest(mode, MODES))

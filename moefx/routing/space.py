"""RAPHAEL's space experts: the tokens of a prompt choose experts, their cross-attention maps say where (2305.18295).

A block by itself: it needs the maps, which fused attention does not form, so no pass wires it into a model.

Legend: B samples, T image tokens, S text tokens, D width, D_s text width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.experts import Experts
from moefx.routing.normalise import normalise
from moefx.routing.select import top_k


class SpaceExperts(nn.Module):
    """``y = 1/S Σ_i E_{r_i}(h ∘ M̂_i)``, ``r_i = argmax G(y_i)``, ``M̂_i[t] = 1[M_i[t] ≥ α max_t M_i[t]]``.

    Every text token sends its own masked copy of the image tokens through one expert, S times the compute of one FFN.
    The gate is a straight-through 1, since the source does not say how it learns.

    Args:
        router: maps text tokens ``[B, S, D_s]`` to logits ``[B, S, E]``.
        experts: FFNs.
        alpha: share of its maximum that a map must reach.
        noise: deviation of the noise on the logits while training.
    """

    def __init__(self, router: nn.Module, experts: Experts, *, alpha: float = 0.2, noise: float = 1.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise OptionError(f"space experts with alpha {alpha}", found="out of range", do="0 <= alpha <= 1")
        self.router, self.experts, self.alpha, self.noise = router, experts, alpha, noise

    def forward(self, h_BTD: Tensor, text: Tensor, maps_BST: Tensor) -> Tensor:
        """Return ``[B, T, D]``.

        Args:
            h_BTD: image tokens.
            text: text tokens ``[B, S, D_s]``.
            maps_BST: cross-attention map of each text token over the image tokens.
        """
        logits: Tensor = self.router(text)
        noisy = logits + self.noise * torch.randn_like(logits) if self.training else logits
        chosen_BS1 = top_k(noisy.detach(), 1)
        gates_BS1 = normalise(logits, chosen_BS1, "ste")
        where = maps_BST >= self.alpha * maps_BST.amax(-1, keepdim=True)
        rows_BSTD = h_BTD.unsqueeze(1) * where.unsqueeze(-1).to(h_BTD.dtype)
        wide = rows_BSTD.shape[:3]
        experts = chosen_BS1.expand(wide).reshape(-1, 1)
        y: Tensor = self.experts(rows_BSTD.flatten(0, 2), experts, gates_BS1.expand(wide).reshape(-1, 1))
        return y.view(*wide, y.shape[-1]).mean(1)

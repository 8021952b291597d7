"""RAPHAEL's space experts: the tokens of a prompt choose experts, their attention maps say where (arXiv 2305.18295).

Legend: B samples, T image tokens, S words (tokens of the prompt), D width, D_w width of a word, H heads, d width of a
head, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.experts import Experts
from moefx.routing.moe import RoutedFFN
from moefx.routing.normalise import normalise
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.record import RoutingRecord
from moefx.routing.select import top_k
from moefx.routing.static import FirstArgument
from moefx.routing.terms import spread


def word_maps(queries: Tensor, keys: Tensor, words: int, *, words_first: bool = False) -> Tensor:
    """Return how much each image token attends to each word, ``softmax_S(q kᵀ/√d)`` averaged over heads, ``[B, S, T]``.

    In joint attention only the queries of the image and the keys of the words count: what an image token sees of the
    image has no part in the map.

    Args:
        queries: ``[B, H, T, d]``, or ``[B, H, T + S, d]`` of joint attention.
        keys: ``[B, H', S or T + S, d]``, H' a divisor of H.
        words: S.
        words_first: the words come before the image in joint attention.
    """
    if keys.shape[2] > words:
        others = keys.shape[2] - words
        keys = keys[:, :, :words] if words_first else keys[:, :, others:]
        queries = queries[:, :, words:] if words_first else queries[:, :, :others]
    dtype = at_least_float32(queries)
    grouped = keys.to(dtype).repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.to(dtype) @ grouped.mT / math.sqrt(queries.shape[-1])
    return scores.softmax(-1).mean(1).mT


class SpaceExperts(KeepFloat32):
    """``y = 1/S Σ_i E_{r_i}(h ∘ M̂_i)``, ``r_i = argmax G(y_i)``, ``M̂_i[t] = 1[M_i[t] ≥ α max_t M_i[t]]``.

    Every word sends its own masked copy of the image through one expert. Words with the same expert give a token the
    same result, h inside their mask and a constant outside, so that an expert sees a token at most once:
    ``y_t = 1/S Σ_e (n_te E_e(h_t) + (n_e − n_te) E_e(0))``, n_te the words of expert e whose mask has token t. The gate
    of a word is a straight-through 1, since the source does not say how it learns.

    Args:
        router: maps words ``[B, S, D_w]`` to logits ``[B, S, E]``.
        experts: FFNs.
        alpha: share of its maximum that a map must reach.
        noise: deviation of the noise on the logits while training.
    """

    def __init__(self, router: nn.Module, experts: Experts, *, alpha: float = 0.2, noise: float = 1.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise OptionError(f"space experts with alpha {alpha}", found="out of range", do="0 <= alpha <= 1")
        self.router, self.experts, self.alpha, self.noise = router, experts, alpha, noise
        self.record = RoutingRecord(experts.num_experts, device=experts.w_in.device)

    def forward(self, h_BTD: Tensor, text: Tensor, maps_BST: Tensor) -> Tensor:
        """Return ``[B, T, D]``.

        Args:
            h_BTD: image tokens.
            text: words ``[B, S, D_w]``.
            maps_BST: attention map of each word over the image.
        """
        count = self.experts.num_experts
        with without_autocast(text):
            logits: Tensor = self.router(text.to(at_least_float32(text)))
        noisy = logits + self.noise * torch.randn_like(logits) if self.training else logits
        chosen_BS1 = top_k(noisy.detach(), 1)
        self.record.update(logits.reshape(-1, count), chosen_BS1.reshape(-1, 1), "ste")
        gates_BSE = spread(normalise(logits, chosen_BS1, "ste").flatten(0, 1), chosen_BS1.flatten(0, 1), count)
        gates_BSE = gates_BSE.view(*logits.shape) / max(1, logits.shape[1])
        inside_BST = maps_BST >= self.alpha * maps_BST.amax(-1, keepdim=True)
        inside_BTE = inside_BST.mT.to(gates_BSE.dtype) @ gates_BSE
        outside_BTE = gates_BSE.sum(1, keepdim=True) - inside_BTE
        return self._sum(h_BTD, inside_BTE, outside_BTE)

    def _sum(self, h_BTD: Tensor, inside_BTE: Tensor, outside_BTE: Tensor) -> Tensor:
        """Return ``Σ_e (inside_e E_e(h) + outside_e E_e(0))``; an expert that no word sends to a token is left out."""
        count = self.experts.num_experts
        every = torch.arange(count, device=h_BTD.device)
        taken = torch.where(inside_BTE.detach() > 0, every, count).flatten(0, 1)
        y: Tensor = self.experts(h_BTD.flatten(0, 1), taken, inside_BTE.flatten(0, 1))
        one = torch.ones((count, 1), dtype=inside_BTE.dtype, device=h_BTD.device)
        of_nothing = self.experts(h_BTD.new_zeros((count, h_BTD.shape[-1])), every.unsqueeze(1), one)
        if self.experts.b_out is not None:
            of_nothing = of_nothing - self.experts.b_out.to(of_nothing.dtype)
        sent: Tensor = y.view(*h_BTD.shape[:-1], -1) + outside_BTE.to(y.dtype) @ of_nothing.to(y.dtype)
        return sent


class EdgeHead(nn.Module):
    """P: five convolutions from the words' map to the logit of an edge at each position.

    The number of words differs from prompt to prompt, so the head reads the mean of their maps, each divided by its
    maximum.

    Widths and kernels are ours; they are not published.
    """

    def __init__(self, width: int = 16, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = [1, width, width, width, width, 1]
        self.layers = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes)])
        with torch.no_grad():
            for parameter in self.parameters():
                fan = parameter[0].numel()
                drawn = torch.randn(parameter.shape, generator=generator) * math.sqrt(2 / fan)
                parameter.copy_(drawn if parameter.ndim == 4 else torch.zeros_like(parameter))

    def forward(self, maps_BST: Tensor, height: int, width: int) -> Tensor:
        """Return ``[B, height, width]``, height · width = T."""
        tiny = torch.finfo(maps_BST.dtype).tiny
        image = (maps_BST / maps_BST.amax(-1, keepdim=True).clamp_min(tiny)).mean(1)
        y = image.reshape(-1, 1, height, width).to(next(self.parameters()).dtype)
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        last: Tensor = self.layers[-1](y)
        return last[:, 0]


def focal_loss(logits: Tensor, target: Tensor, *, alpha: float = 0.5, gamma: float = 2.0) -> Tensor:
    """Return ``−α_t (1 − p_t)^γ log p_t`` elementwise, p_t the probability of what the target says (arXiv 1708.02002).

    Targets between 0 and 1 weigh both sides.
    """
    p = logits.sigmoid()
    edge = alpha * (1 - p) ** gamma * F.logsigmoid(logits)
    none = (1 - alpha) * p**gamma * F.logsigmoid(-logits)
    return -(target * edge + (1 - target) * none)


class SpaceTimeFFN(nn.Module):
    """``h = time(x);  y = h + space(h)``: RAPHAEL's two mixtures in the place of one FFN.

    The sum with h is ours: the space experts then start at zero and the FFN as it was.

    While ``given(model, edges=maps)`` holds, with ``maps`` ``[B, height, width]`` in [0, 1], the term ``edge`` is the
    focal loss of the edges that the head sees in the attention maps; ``edge_samples`` ``[B]`` (bool) says for which
    samples, in the paper those with t < 500.

    Args:
        time: the routed FFN; reads the first taps.
        space: reads words and attention.
        edge: the head, or None.
        words_first: see `word_maps`.
    """

    takes = ("edges", "edge_samples")
    # Folded, it still reads words and attention.
    same_arguments = True

    def __init__(
        self,
        time: RoutedFFN | FirstArgument,
        space: SpaceExperts,
        edge: EdgeHead | None = None,
        *,
        words_first: bool = False,
    ) -> None:
        super().__init__()
        self.time, self.space, self.edge, self.words_first = time, space, edge, words_first
        self.taps = (*time.taps, "words", "queries", "keys")
        self.given: dict[str, Tensor] = {}

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, T, D]`` to ``[B, T, D]``; ``taps`` are those of ``time``, words, queries and keys."""
        *mine, words, queries, keys = taps
        h: Tensor = self.time(x, *mine)
        with without_autocast(x):
            maps = word_maps(queries, keys, words.shape[1], words_first=self.words_first).expand(-1, -1, x.shape[1])
        y: Tensor = h + self.space(h, words, maps)
        if self.edge is not None and "edges" in self.given and torch.is_grad_enabled():
            self.space.record.add("edge", self._edge_loss(maps, self.given["edges"]))
        return y

    @property
    def deciding(self) -> tuple[int, ...]:
        """Those of the timestep's mixture; see `moefx.routing.static`."""
        return tuple(getattr(self.time, "deciding", ()))

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the choice of the timestep's mixture, and the layer with that mixture folded: words go on choosing."""
        assert isinstance(self.time, RoutedFFN)
        choice, static = self.time.fold(values, shared)
        time = FirstArgument(static, self.time.taps)
        return choice, SpaceTimeFFN(time, self.space, self.edge, words_first=self.words_first)

    def _edge_loss(self, maps: Tensor, edges: Tensor) -> Tensor:
        assert self.edge is not None
        height, width = _grid(edges, maps.shape[-1])
        logits = self.edge(maps, height, width)
        target = F.adaptive_avg_pool2d(edges.to(logits), (height, width))
        losses = focal_loss(logits, target).mean((1, 2))
        kept = self.given.get("edge_samples")
        return losses.mean() if kept is None else (losses * kept.to(losses)).sum() / kept.sum().clamp(min=1)


def _grid(edges: Tensor, tokens: int) -> tuple[int, int]:
    """Return height and width of the tokens' grid: of the shape of the edge map, with as many cells as tokens."""
    if edges.ndim == 3 and edges.shape[-2]:
        height = max(1, round(math.sqrt(tokens * edges.shape[-2] / max(1, edges.shape[-1]))))
        if height * (tokens // height) == tokens:
            return height, tokens // height
    raise InputError(
        "learn edges",
        found=f"an edge map of shape {tuple(edges.shape)} for {tokens} image tokens",
        do="give [B, height, width] in the proportions of the image",
    )

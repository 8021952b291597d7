"""Space experts written out, sample by sample and word by word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefx.errors import OptionError
from moefx.routing import Experts, random_weights
from moefx.routing.scorers import LinearScorer
from moefx.routing.space import SpaceExperts


def test_each_word_masks_the_image_and_chooses_an_expert() -> None:
    draws = torch.Generator().manual_seed(0)
    weights = random_weights(6, 8, num_experts=3, generator=draws, dtype=torch.float64)
    router = LinearScorer(5, 3, std=1.0, generator=draws).double()
    layer = SpaceExperts(router, Experts(weights, F.gelu), alpha=0.4).eval()
    h = torch.randn(2, 7, 6, dtype=torch.float64, generator=draws)
    text = torch.randn(2, 4, 5, dtype=torch.float64, generator=draws)
    maps = torch.rand(2, 4, 7, dtype=torch.float64, generator=draws)
    wanted = torch.zeros_like(h)
    for b in range(2):
        for i in range(4):
            e = int((text[b, i] @ router.weight.T).argmax())
            mask = (maps[b, i] >= 0.4 * maps[b, i].max()).double().unsqueeze(1)
            up = F.gelu((h[b] * mask) @ weights.w_in[e].T + weights.b_in[e])
            wanted[b] += (up @ weights.w_out[e].T + weights.b_out) / 4
    found = layer(h, text, maps)
    assert float((found - wanted).detach().norm() / wanted.norm()) < 1e-10
    for training in (True, False):
        layer.train(training).zero_grad()
        layer(h, text, maps).square().sum().backward()
        assert isinstance(layer.router.weight, nn.Parameter)
        assert float(layer.router.weight.grad.abs().max()) > 0
    with pytest.raises(OptionError, match="out of range"):
        SpaceExperts(router, Experts(weights, F.gelu), alpha=2.0)

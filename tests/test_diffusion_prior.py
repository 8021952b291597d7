"""`moefx.training.DiffusionPrior`: Switch-DiT's loss over all masked blocks of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moefx.errors import InputError, OptionError
from moefx.routing.prior import prior_map
from moefx.training import DiffusionPrior
from tests import recipe_support as support
from tests.recipe_support import DIT

T, LABEL = torch.tensor([130, 870]), torch.tensor([1, 5])


def masked() -> Any:
    model = support.realised("switch-dit", DIT)
    generator = torch.Generator().manual_seed(0)
    for block in model.transformer_blocks:
        torch.nn.init.normal_(block.stream_mask.routed.router.scorer.weight, std=0.5, generator=generator)
    return model.train()


def call(model: Any) -> Tensor:
    return support.call(model, support.inputs(DIT), grad=True)


def test_the_loss_is_the_divergence_and_trains_the_routers() -> None:
    model = masked()
    prior = DiffusionPrior(model, last_timestep=999, rematch=10**6)
    call(model)
    masks = [block.stream_mask.routed for block in model.transformer_blocks]
    p = torch.cat([m.record.kept for m in masks], -1).double() / len(masks)
    count = len(p)
    t = T[:1].expand(count)
    loss = prior(t)
    rows = prior_map(1000, len(masks), masks[0].record.num_experts, 2)[t][:, prior.columns].double()
    q = rows / rows.sum(-1, keepdim=True)
    m = (p + q) / 2
    kl = [(a * ((a + 1e-6) / (m + 1e-6)).log()).sum(-1) for a in (p, q)]
    assert float(loss.detach()) == pytest.approx(float(((kl[0] + kl[1]) / 2).mean().detach()), rel=1e-5)
    loss.backward()
    for mask in masks:
        assert float(mask.router.scorer.weight.grad.norm()) > 0


def test_units_are_matched_with_columns_by_what_was_chosen() -> None:
    model = masked()
    prior = DiffusionPrior(model, last_timestep=1.0, levels=8, rematch=1)
    units = prior.chosen.shape[1]
    order = torch.randperm(units, generator=torch.Generator().manual_seed(3))
    prior.chosen.copy_(prior.columns_at[:, order])
    prior.visited.fill_(1.0)
    assert torch.equal(prior.columns_at[:, torch.from_numpy(prior._matched())], prior.chosen)


def test_state_is_kept_and_misuse_is_refused() -> None:
    model = masked()
    prior = DiffusionPrior(model, last_timestep=999)
    with pytest.raises(InputError, match="were not called"):
        prior(T)
    call(model)
    prior(T[:1])
    assert int(prior.steps) == 1
    again = DiffusionPrior(model, last_timestep=999)
    again.load_state_dict(prior.state_dict())
    assert torch.equal(again.chosen, prior.chosen)
    with pytest.raises(OptionError, match="0 masked blocks"):
        DiffusionPrior(support.dense(DIT), last_timestep=999)

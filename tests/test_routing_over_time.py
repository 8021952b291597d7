"""Slots that the timestep allows, against layers that have as many slots at every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moefx.errors import InputError, OptionError
from moefx.routing import ExpertChoice, Experts, LinearRouter, RoutedFFN, Selector, TopK, random_weights
from moefx.routing.over_time import OverTime
from tests import recipe_support as support
from tests.recipe_support import DIT

pytestmark = support.MARKS
F64 = torch.float64


def layer(selector: Selector) -> RoutedFFN:
    draws = torch.Generator().manual_seed(0)
    weights = random_weights(6, 8, num_experts=4, generator=draws, dtype=F64)
    router = LinearRouter(6, 4, std=1.0, generator=draws).double()
    mode = "softmax_topk" if selector.by_expert else "softmax_topk_renorm"
    return RoutedFFN(router, Experts(weights, F.gelu), selector=selector, mode=mode).double()


@pytest.mark.parametrize("kind", ["top-k", "expert-choice"])
def test_each_sample_has_the_slots_of_its_time(kind: str) -> None:
    def plain(share: float) -> Selector:
        return TopK(round(4 * share)) if kind == "top-k" else ExpertChoice(4 * share)

    timed = layer(OverTime(plain(1.0), [0.25, 0.5, 1.0], steps=900.0))
    assert timed.taps == ("timestep",)
    x = torch.randn(3, 8, 6, dtype=F64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([899.0, 0.0, 300.0])
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = timed(one, t)
    by_share = {share: layer(plain(share)) for share in (0.25, 0.5, 1.0)}
    rows = [by_share[share](two[i : i + 1]) for i, share in enumerate((1.0, 0.25, 0.5))]
    wanted = torch.cat(rows)
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 1e-10
    weight = torch.linspace(-1, 1, found.numel(), dtype=F64).view_as(found).cos()
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert float((one.grad - two.grad).norm() / two.grad.norm()) < 1e-10
    for name, parameter in timed.named_parameters():
        others = [dict(m.named_parameters())[name].grad for m in by_share.values()]
        total = sum(g for g in others if g is not None)
        assert float((parameter.grad - total).norm()) <= 1e-10 * float(total.norm())
    same = torch.tensor(300.0)
    assert torch.equal(timed(x, same), timed(x, same.expand(3)))


def test_impossible_choices() -> None:
    with pytest.raises(OptionError, match="out of range"):
        OverTime(TopK(2), [0.5, 0.0])
    with pytest.raises(OptionError, match="pool='sample'"):
        OverTime(ExpertChoice(1.0, pool="batch"), [0.5])
    with pytest.raises(OptionError, match="over_time goes with"):
        support.realised("sparse-upcycling", DIT, selector="top-p", over_time=[0.5])
    with pytest.raises(InputError, match="not an embedding"):
        layer(OverTime(TopK(2), [0.5]))(torch.randn(2, 3, 6, dtype=F64), torch.randn(2, 5))


@pytest.mark.parametrize(
    "options", [{"top_k": 4}, {"selector": "expert-choice", "capacity": 2.0}], ids=["top-k", "choice"]
)
def test_from_a_recipe(options: dict[str, Any], tmp_path: Path) -> None:
    model = support.realised("sparse-upcycling", DIT, experts=4, over_time=[0.5, 1.0], noise=0.1, **options)
    support.check_runs(model, DIT)
    support.check_learns(model, DIT, training=True)
    support.check_batch_invariant(model, DIT)
    support.check_saves(model, DIT, tmp_path)
    if "top_k" in options:
        exact = support.realised("sparse-upcycling", DIT, experts=4, over_time=[0.5, 1.0], **options)
        support.check_equal(exact, DIT)
        support.check_compiles(exact, DIT)

"""One FFN, one head, one token and one timestep recipe together on one model; orders that cannot be are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moefx
from moefx.errors import NothingMatched, PlanError
from moefx.passes.rewrite import Pass, get_pass
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3, WAN
from tests.trace_support import call, tensors

pytestmark = support.MARKS
# Each at its exact start, so that together they are the dense model.
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "ffn": ("upcycle", {"experts": 3, "top_k": 1}),
    "head": ("mixture-of-heads", {}),
    "token": ("mixture-of-depths", {"capacity": 1.0}),
    "time": ("channel-windows", {"share": 1.0}),
}


def made(kind: str, name: str, **options: Any) -> Pass:
    rule, chosen = EXACT[kind]
    last = {"last_timestep": 1.0} if kind == "time" and name == FLUX else {}
    return get_pass(rule)(**chosen | last | options)


def one_by_one(name: str, kinds: str) -> nn.Module:
    model = support.dense(name)
    for kind in kinds.split():
        moefx.transform(model, support.inputs(name), passes=[made(kind, name)])
    return model


def check(model: Any, name: str) -> None:
    """The model is still the dense one, holds all four rewrites, and a loss reaches every router."""
    support.check_equal(model, name, 2e-5)
    assert {site.rule for plan in model.moefx.plans for site in plan.sites} == {rule for rule, _ in EXACT.values()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "router" in key or "gate" in key.rpartition(".")[2]:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.train()
    loss = tensors(call(model, support.inputs(name), grad=True))[0].square().mean()
    loss.backward()
    for kind in ("RoutedFFN", "HeadGate", "TokenRouter"):
        layers = [m for m in model.modules() if type(m).__name__ == kind]
        assert layers, kind
        moved = [any(p.grad is not None and bool(p.grad.any()) for p in m.parameters()) for m in layers]
        # The last block of SD3 throws its text away, and with it some of what is routed there.
        assert sum(moved) >= max(1, len(moved) - 2), kind


@pytest.mark.parametrize("order", ["time head ffn token", "ffn time token head"])
def test_any_legal_order(order: str) -> None:
    check(one_by_one(DIT, order), DIT)


@pytest.mark.slow
@pytest.mark.parametrize("name", [SD3, FLUX])
def test_other_models(name: str) -> None:
    check(one_by_one(name, "ffn time head token"), name)


def test_all_in_one_transform() -> None:
    model = support.dense(WAN)
    moefx.transform(model, support.inputs(WAN), passes=[made(kind, WAN) for kind in ("token", "ffn", "head", "time")])
    check(model, WAN)


def test_composed_it_is_sparse_and_finite() -> None:
    model = support.dense(DIT)
    for kind, options in (("ffn", {}), ("head", {}), ("time", {"share": 0.8}), ("token", {"capacity": 0.5})):
        moefx.transform(model, support.inputs(DIT), passes=[made(kind, DIT, **options)])
    for batch in (2, 3):
        assert all(bool(t.isfinite().all()) for t in tensors(call(model, support.inputs(DIT, batch))))


def test_orders_that_cannot_be_are_refused_with_the_one_that_can() -> None:
    with pytest.raises(NothingMatched, match="apply channel-windows before mixture-of-depths"):
        one_by_one(DIT, "token time")
    with pytest.raises(PlanError, match="transform with mixture-of-heads first, then with mixture-of-depths"):
        moefx.transform(support.dense(FLUX), passes=[made("token", FLUX), made("head", FLUX)])

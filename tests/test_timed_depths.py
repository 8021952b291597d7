"""Mixture of depths whose capacity follows the noise level: against models of that capacity, and specialised to it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moefx
from examples.dit import DiT
from moefx.errors import NothingMatched, OptionError
from moefx.routing.timed_depths import TimedTokenRouter
from tests import recipe_support as support

pytestmark = support.MARKS
SHARES = [0.25, 1.0]


def dense() -> DiT:
    torch.manual_seed(0)
    model = DiT(image_size=8, patch=2, in_channels=1, depth=2, width=16, heads=2, classes=4, label_dropout=0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch(times: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(len(times))
    x = torch.randn(len(times), 1, 8, 8, generator=draws, dtype=torch.float64)
    return x, torch.tensor(times, dtype=torch.float64), torch.arange(len(times)) % 4


def routed(capacity: float = 0.5, **options: Any) -> DiT:
    """A model whose routers' weights depend on the seed alone."""
    model, inputs = dense(), batch([700.0, 200.0])
    given = {"capacity": capacity, "router_std": 1.0, "every": 1, "verify": False, **options}
    return moefx.transform(model, inputs, recipe="mod", **given).eval()


def test_the_best_tokens_pass_at_each_noise_level() -> None:
    router = TimedTokenRouter(8, [0.3, 1.0], capacity=0.5, std=1.0).double()
    x, t = torch.randn(3, 20, 8, dtype=torch.float64), torch.tensor([10.0, 600.0, 499.0])
    tokens, weights, passes = router(x, t)
    assert tokens.shape == (3, 10)
    assert bool((tokens.diff(dim=1) > 0).all())
    for b, count in enumerate([3, 10, 3]):
        scores = x[b] @ router.weight[0] + router.bias
        best = sorted(range(20), key=lambda i, s=scores: -s[i].item())[:count]
        assert tokens[b][passes[b]].tolist() == sorted(best)
        torch.testing.assert_close(weights[b], scores)
    router.train()(x, t)
    assert float(router.record.load[1]) == pytest.approx(16 / 60)
    for broken in ([], [0.0], [1.5]):
        with pytest.raises(OptionError, match="tokens over time"):
            TimedTokenRouter(8, broken)


def test_each_sample_gets_the_capacity_of_its_timestep() -> None:
    """Tokens that do not pass are keys only, so each sample equals a model of its own, smaller capacity."""
    model = routed(over_time=SHARES, keep_keys=True)
    low, high = routed(0.125, keep_keys=True), routed(0.5, keep_keys=True)
    inputs = batch([900.0, 100.0, 499.0, 500.0])
    found = model(*inputs)
    for b, alike in enumerate([high, low, low, high]):
        one = tuple(v[b : b + 1] for v in inputs)
        torch.testing.assert_close(found[b : b + 1], alike(*one), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(*one), found[b : b + 1], rtol=1e-10, atol=1e-10)
    assert model.moefx.report.plan.cost.flops_ratio < high.moefx.report.plan.cost.flops_ratio
    weights = [block.token_router.weight for block in model.blocks]
    assert all(bool(g.any()) for g in torch.autograd.grad(found.square().sum(), weights))


def test_specialised_it_runs_on_the_tokens_that_pass() -> None:
    model = routed(over_time=SHARES, keep_keys=True)
    special = moefx.specialise(model, [900.0, 600.0, 100.0], batch([700.0, 200.0]))
    assert not special.left
    assert len(special.variants) == 2
    spent = []
    for time in (900.0, 100.0):
        inputs = batch([time] * 3)
        torch.testing.assert_close(special(*inputs), model(*inputs), rtol=1e-10, atol=1e-10)
        with FlopCounterMode(display=False) as counter:
            special(*inputs)
        spent.append(counter.get_total_flops())
    assert spent[1] < 0.9 * spent[0]
    assert special.fallbacks == 0
    with pytest.raises(NothingMatched, match="reads tokens"):
        moefx.specialise(routed(over_time=SHARES), [900.0], batch([700.0, 200.0]))


@torch.no_grad()
def test_it_compiles_once_and_is_saved(tmp_path: Any) -> None:
    model = routed(over_time=SHARES)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for times in ([900.0, 100.0, 300.0], [40.0, 999.0]):
        inputs = batch(times)
        with torch._dynamo.config.patch(error_on_recompile=len(times) == 2):
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
    moefx.save(model, tmp_path / "m")
    again = moefx.load(tmp_path / "m", copy.deepcopy(dense()))
    assert torch.equal(again(*inputs), model(*inputs))


def test_shares_of_one_are_the_model_without() -> None:
    inputs = batch([700.0, 200.0])
    exact = moefx.transform(dense(), inputs, recipe="mod", over_time=[1.0, 1.0], every=1)
    assert exact.moefx.report.checks
    assert torch.equal(exact(*inputs), dense()(*inputs))
    torch.testing.assert_close(routed(over_time=[1.0])(*inputs), routed()(*inputs), rtol=1e-12, atol=1e-12)
    with pytest.raises(OptionError, match="must be shares"):
        routed(over_time=[2.0])

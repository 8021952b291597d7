"""Recipes whose experts start as copies of a dense network: each layer against its equation, forward and gradient.

How copies are exact at the start, and by which factor they are not, is in test_routing_ffn.py (T1 to T20); the draws
of drop-upcycling are in test_routing_initialise.py; ANT's intervals are in test_recipe_ant.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.routing import RoutedFFN
from moefx.routing.router import sinusoidal
from tests import recipe_support as support
from tests.recipe_support import DIT
from tests.test_recipes_ffn import assert_equal, every_expert, kept, mixed, tokens

pytestmark = support.MARKS
TIMES = torch.tensor([130.0, 870.0], dtype=torch.float64)


def layer_of(recipe: str, **options: Any) -> RoutedFFN:
    """Return one routed layer in float64, its copies made different and its router decided."""
    model = support.realised(recipe, DIT, verify=False, **options)
    layer = next(iter(support.layers(model).values())).double()
    assert isinstance(layer, RoutedFFN)
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            size = 0.6 if "router" in name else 0.1
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * size
            parameter.copy_(noise if "router" in name else parameter + noise)
    return layer


@pytest.mark.parametrize("recipe", ["sparse-upcycling", "drop-upcycling"])
def test_whole_copies(recipe: str) -> None:
    layer = layer_of(recipe, experts=4)

    def expected(x: Tensor) -> Tensor:
        p = (x @ layer.router.weight.T).softmax(-1)
        g = p * kept(p, 2)
        return mixed(layer, x, g / g.sum(-1, keepdim=True))

    assert_equal(layer, expected, tokens(layer))


def test_copies_chosen_by_timestep_and_token() -> None:
    layer = layer_of("timestep-upcycling", experts=4)

    def expected(x: Tensor, t: Tensor) -> Tensor:
        time = sinusoidal(t, 256).double() @ layer.router.tap_weight.T
        p = (x @ layer.router.weight.T + time.unsqueeze(1)).softmax(-1)
        g = p * kept(p, 2)
        return mixed(layer, x, g / g.sum(-1, keepdim=True))

    assert_equal(layer, expected, tokens(layer), TIMES)


def test_a_group_of_shards_is_chosen_whole() -> None:
    layer = layer_of("virtual-groups")
    assert layer.experts.num_experts == 8

    def expected(x: Tensor) -> Tensor:
        p = (x @ layer.router.weight.T).softmax(-1)
        g = kept(p, 1) * (1 + p - p.detach())
        shards = every_expert(layer, x).unflatten(-2, (4, 2)).sum(-2)
        return (g.unsqueeze(-1) * shards).sum(-2) + layer.experts.b_out

    assert_equal(layer, expected, tokens(layer))


def test_an_interval_has_a_network_of_its_own() -> None:
    layer = layer_of("ant")
    bounds = layer.selector.bounds
    assert TIMES[0] < bounds[0]
    assert TIMES[1] > bounds[3]

    def expected(x: Tensor, t: Tensor) -> Tensor:
        one = F.one_hot(torch.tensor([0, 4]), 5).double().unsqueeze(1)
        return mixed(layer, x, one.expand(-1, x.shape[1], -1))

    assert_equal(layer, expected, tokens(layer), TIMES)


def test_copies_that_every_token_gets_at_a_sigmoid_of_zero_are_half_of_them() -> None:
    model = support.realised("moma", DIT, router_std=0.0, capacity=4.0, verify=False)
    path, layer = next(iter(support.layers(model).items()))
    x = torch.randn(3, 5, layer.experts.w_in.shape[-1])
    bias = layer.experts.b_out
    wanted = 2 * (support.dense(DIT).get_submodule(path)(x) - bias) + bias
    torch.testing.assert_close(layer.eval()(x), wanted, rtol=1e-5, atol=1e-6)

"""Recipes whose router reads the timestep alone, over whole sampling runs: specialised they equal the routed model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.errors import NothingMatched
from moefx.recipes import recipes
from moefx.routing import RoutedFFN
from moefx.routing.record import RoutingRecord
from tests import recipe_support as support
from tests.recipe_support import DIT, WAN
from tests.trace_support import error, tensors

pytestmark = support.MARKS
# Recipe, model, options; the routers of the last ones read tokens too unless told otherwise.
BY_TIMESTEP: dict[str, tuple[str, dict[str, Any]]] = {
    "ant": (DIT, {}),
    "dtr": (DIT, {}),
    "dydit": (DIT, {}),
    "dydit-heads": (DIT, {}),
    "mode": (DIT, {}),
    "ppap": (DIT, {}),
    "raphael": (WAN, {}),
    "remix-dit": (DIT, {}),
    "switch-dit": (DIT, {}),
    "vorta": (DIT, {}),
    "lora-moe": (DIT, {"router_input": "timestep", "top_k": 2, "targets": ["in", "out"]}),
    "timestep-lora": (DIT, {"router_input": "timestep"}),
}
# What else reads the timestep, and why it is not here.
ELSEWHERE = {
    "harmonica": "the step is told, not read",
    "mixture-of-blocks": "reads tokens",
    "nucleus": "reads tokens",
    "timestep-upcycling": "reads tokens",
    "wan-switch": "whole models: tests/test_recipe_wan_switch.py",
}
STEPS = (950.0, 450.0, 50.0)


def learnt(recipe: str) -> tuple[nn.Module, str]:
    """Return a routed model in float64 whose routers and experts are away from their start."""
    name, options = BY_TIMESTEP[recipe]
    model = support.realised(recipe, name, verify=False, **options).double().eval()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in support.layers(model).values():
            for path, parameter in layer.named_parameters():
                deviation = 1.0 if "router" in path else 0.1
                parameter.add_(deviation * torch.randn(parameter.shape, generator=draws).to(parameter))
    return model, name


def inputs(name: str) -> dict[str, Any]:
    """Return example inputs in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in support.inputs(name).items()}


def sampled(model: nn.Module, name: str) -> Tensor:
    """Return what an Euler sampler makes of noise."""
    given = inputs(name)
    x = given.pop("hidden_states")
    with torch.no_grad():
        for step in STEPS:
            given["timestep"] = torch.full_like(given["timestep"], step)
            made = tensors(model(hidden_states=x, **given))[0][:, : x.shape[1]]
            x = x - 0.1 * made / made.std()
    return x


@pytest.mark.parametrize("recipe", BY_TIMESTEP)
def test_a_sampling_run_equals_that_of_the_routed_model(recipe: str) -> None:
    model, name = learnt(recipe)
    special = moefx.specialise(model, STEPS, inputs(name))
    assert not special.left
    assert error(sampled(special, name), sampled(model, name)) < 1e-10
    assert special.fallbacks == 0
    if recipe not in ("dtr", "raphael"):  # a mask by rule; words still choose
        parts = [m for variant in special.variants for m in variant.modules()]
        assert not any(isinstance(m, RoutedFFN | RoutingRecord) for m in parts)
    if recipe != "mode":  # it knows nothing but its own experts
        assert len(special.variants) > 1


def test_every_recipe_by_timestep_is_tried() -> None:
    reading = {r.name for r in recipes() if "timestep" in r.choices.reads or "step" in r.choices.granularity}
    assert reading == (BY_TIMESTEP.keys() - {"lora-moe"}) | ELSEWHERE.keys()


def test_merged_deltas_are_shared_and_routers_that_read_tokens_are_named() -> None:
    model, name = learnt("ppap")
    special = moefx.specialise(model, [950.0, 930.0, 10.0, 20.0], inputs(name))
    assert len(special.variants) == 2  # two of the five intervals
    path = next(iter(support.layers(model)))
    one, two = (variant.get_submodule(path).static.weights for variant in special.variants)
    dense = model.get_submodule(path).experts
    e = 4 if bool(special.variant_of[950.0] == 0) else 0
    wanted = dense.dense.w_in + dense.scaling * dense.b_in[e] @ dense.a_in[e]
    assert error(one.w_in, wanted.detach()) < 1e-12
    assert one.b_in.data_ptr() == two.b_in.data_ptr()
    tokens = support.realised("timestep-lora", DIT, verify=False).eval()
    with pytest.raises(NothingMatched, match="its router reads tokens"):
        moefx.specialise(tokens, [950.0], support.inputs(DIT))

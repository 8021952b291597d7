"""Two whole models behind a boundary, by a transform: which runs, what it learns, how it is kept and specialised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moefx
from moefx.errors import InputError, PlanError
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, MODELS, WAN
from tests.trace_support import call, error, gradients

pytestmark = support.MARKS


def switched(name: str, **options: float) -> torch.nn.Module:
    """Return the model with a low-noise half that differs from it."""
    model = support.realised("wan-switch", name, **({"timesteps": 1.0} if name == FLUX else {}) | options)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.model_switch.low_noise_model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.02)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_start_equal_and_each_side_runs_and_learns_alone(name: str, tmp_path: Path) -> None:
    model = support.realised("wan-switch", name, boundary=0.5, **({"timesteps": 1.0} if name == FLUX else {}))
    support.check_equal(model, name, 0.0)
    model = switched(name, boundary=0.5)
    low, dense = model.model_switch.low_noise_model, support.dense(name)
    given = support.inputs(name)
    top = 1.0 if name == FLUX else 1000.0
    for share, expert, side in ((0.7, dense, "high"), (0.2, low, "low")):
        t = torch.full_like(torch.as_tensor(given["timestep"]), share * top)
        wanted = call(expert, given | {"timestep": t})
        assert error(call(model, given | {"timestep": t}), wanted) == 0
        with model.model_switch.fixed(side):
            assert error(call(model, given), call(expert, given)) == 0
        mine = expert if side == "low" else dense.train(False)
        theirs = gradients(mine, mine, given | {"timestep": t})
        for training in (True, False):
            model.train(training)
            found = gradients(model, model, given | {"timestep": t})
            prefix = "model_switch.low_noise_model." if side == "low" else ""
            assert found.keys() == {prefix + key for key in theirs}
            if not training:
                assert all(torch.equal(found[prefix + key], value) for key, value in theirs.items())
    if name == WAN:
        support.check_saves(model, name, tmp_path)
        assert torch.equal(moefx.untransform(model).proj_out.weight, dense.proj_out.weight)
        assert not hasattr(model, "model_switch")


def test_specialised_it_is_the_model_of_each_timestep() -> None:
    model = switched(WAN)
    given, low = support.inputs(WAN), model.model_switch.low_noise_model
    fast = moefx.specialise(model, [990.0, 875.0, 874.0, 10.0], given)
    assert fast.variant_of == {990.0: 0, 875.0: 0, 874.0: 1, 10.0: 1}
    assert fast.variants[1] is low
    assert not hasattr(fast.variants[0], "model_switch")
    for t, expert in ((875, support.dense(WAN)), (10, low)):
        now = given | {"timestep": torch.full_like(given["timestep"], t)}
        assert error(call(fast, now), call(expert, now)) == 0
    mixed = given | {"timestep": torch.tensor([990, 10])}
    assert error(call(fast, mixed), call(model, mixed)) == 0
    assert fast.fallbacks == 1
    shared = {id(p) for p in model.parameters()}
    assert all(id(p) in shared for p in fast.variants.parameters())


def test_routers_inside_are_specialised_too() -> None:
    model = support.realised("ant", DIT, cut="time")
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in support.layers(model).values():
            layer.experts.w_out.add_(torch.randn(layer.experts.w_out.shape, generator=draws) * 0.1)
    moefx.transform(model, support.inputs(DIT), recipe="wan-switch", boundary=0.5)
    given = support.inputs(DIT)
    fast = moefx.specialise(model.eval(), [900.0, 850.0, 700.0, 100.0], given)
    assert list(fast.variant_of.values()) == [0, 0, 1, 2]
    for t in fast.variant_of:
        now = given | {"timestep": torch.full_like(given["timestep"], t)}
        assert error(call(fast, now), call(model, now)) < 1e-5
    assert fast.fallbacks == 0


def test_refusals_say_the_order() -> None:
    with pytest.raises(PlanError, match="with the others first"):
        moefx.transform(support.dense(DIT), passes=["upcycle", "model-switch"])
    with pytest.raises(PlanError, match="switch models in the last transform"):
        moefx.transform(switched(DIT), recipe="sparse-upcycling")
    with pytest.raises(InputError, match="name the timestep"):
        moefx.transform(support.dense(DIT), recipe="wan-switch", argument="sigma")

"""Splits of real architectures: realised, saved and loaded, compiled, undone, and refused with a reason."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx import zoo
from moefx.errors import InputError, MoefxWarning, NothingMatched, OptionError
from moefx.graph.inputs import synthesise
from moefx.routing import RoutedFFN
from moefx.routing.neurons import NeuronSubsets, ThresholdNeurons, TopNeurons
from tests.split_support import all_tokens, batch, calibrated, convert, relative, small_dit
from tests.trace_support import QUIET, call, error, fingerprint

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]

MODELS = (
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
)
SMALL = {"experts": 3, "shared": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "moefx-split": {**SMALL, "top_k": 1},
    "cmoe": {**SMALL, "top_k": 1},
    "dense2moe": {**SMALL, "top_k": 1, "scale": 3.0},
    "moefication": {"experts": 4, "top_k": 2, "router_steps": 20},
    "d2dmoe": {"experts": 4, "top_k": 2, "router_steps": 20, "router_hidden": 8},
    "read-me": {"experts": 2},
    "lazy-neuron": {},
    "chess": {},
}
PAIRS = [(m, r) for m in MODELS for r in ("moefx-split", "cmoe", "chess")]
PAIRS += [("FluxTransformer2DModel", r) for r in RECIPES if r not in ("moefx-split", "cmoe", "chess")]
LAYERS = (RoutedFFN, NeuronSubsets, ThresholdNeurons, TopNeurons)


@functools.cache
def dense(name: str) -> tuple[nn.Module, Any, moefx.Calibration]:
    model = zoo.tiny(name)
    inputs = synthesise(model, batch=2)

    def loss(output: Any, _: Any) -> Tensor:
        return sum(leaf.square().mean() for leaf in torch.utils._pytree.tree_leaves(output) if leaf is not None)

    return model, inputs, moefx.calibrate(model, [inputs], loss=loss, buckets=2, samples=64, progress=False)


@pytest.mark.parametrize(("name", "recipe"), PAIRS)
def test_realised_and_undone(name: str, recipe: str) -> None:
    original, inputs, calibration = dense(name)
    model = copy.deepcopy(original)
    before = fingerprint(model)
    wanted = call(model, inputs)
    moefx.transform(model, inputs, recipe=recipe, calibration=calibration, max_error=50.0, **RECIPES[recipe])
    plan = model.moefx.report.plan
    assert len([m for m in model.modules() if isinstance(m, LAYERS)]) == len(plan.sites)
    assert sum(p.numel() for p in model.parameters()) == plan.cost.parameters_after
    if not (recipe == "d2dmoe" or recipe == "moefication"):  # on so small a width a router is as large as the network
        assert all(site.active_after < site.active_before for site in plan.sites)
    found = call(model, inputs)
    assert all(bool(torch.isfinite(t).all()) for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor))
    assert error(found, wanted) > 0
    for size in (1, 3):
        call(model, synthesise(model, batch=size))
    moefx.untransform(model)
    assert fingerprint(model) == before
    assert error(call(model, inputs), wanted) == 0


@pytest.mark.parametrize("name", MODELS)
def test_all_slices_are_the_dense_model(name: str) -> None:
    original, inputs, calibration = dense(name)
    model = moefx.transform(
        copy.deepcopy(original),
        inputs,
        passes=["split"],
        calibration=calibration,
        experts=3,
        shared=1,
        top_k=3,
        compensation="mean",
        importance="usage",
    )
    report = model.moefx.report
    assert all(check.contract == "exact" for check in report.checks)
    assert error(call(model, inputs), call(original, inputs)) < 1e-5


@pytest.mark.parametrize("recipe", ["moefx-split", "cmoe", "moefication", "read-me", "chess"])
def test_saved_and_loaded(recipe: str, tmp_path: Path) -> None:
    options = {"read-me": {"experts": 3}, "cmoe": {"experts": 6}, "chess": {}}.get(
        recipe, {"experts": 8, "shared": 0, "top_k": 2, "router_steps": 20}
    )
    _, model = convert(recipe, **options)
    moefx.save(model, tmp_path / "saved")
    assert (tmp_path / "saved" / "moefx_calibration.safetensors").stat().st_size < 100_000
    loaded = moefx.load(tmp_path / "saved", small_dit())
    # Not to the bit: loaded tensors may lie otherwise in memory, and products sum in another order then.
    assert relative(loaded(*batch(9)), model(*batch(9))) < 1e-14
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    kept, made = loaded.moefx.calibration.layer("blocks.0.mlp"), calibrated()[1].layer("blocks.0.mlp")
    assert torch.equal(kept.hidden.mean, made.hidden.mean)
    assert len(kept.sample.x) == 0
    with torch.device("meta"):
        empty = small_dit()
    assert relative(moefx.load(tmp_path / "saved", empty.eval())(*batch(9)), model(*batch(9))) < 1e-14


@pytest.mark.parametrize("recipe", ["moefx-split", "cmoe", "read-me", "lazy-neuron", "moefication"])
def test_a_sample_does_not_see_its_batch(recipe: str) -> None:
    options = {"read-me": {"experts": 3}, "lazy-neuron": {}, "cmoe": {"experts": 6}}.get(
        recipe, {"experts": 8, "shared": 0, "top_k": 2, "router_steps": 20}
    )
    dense_model, model = convert(recipe, **options)
    layer = model.get_submodule("blocks.1.mlp").eval()
    x = all_tokens(dense_model).view(-1, 16, 16)[:6]
    assert relative(layer(x)[2:3], layer(x[2:3])) < 1e-12


def test_selector_of_intervals_and_its_bias() -> None:
    """Thresholds by timestep, where the block sees it: other neurons' slices at other noise levels."""
    from moefx.routing.slices import RelativeThreshold, TimestepThreshold

    scores = torch.tensor([[[0.4, 0.1, 0.9]], [[0.4, 0.1, 0.9]]])
    x, t = torch.zeros(2, 1, 4), torch.tensor([100.0, 900.0])
    cut = TimestepThreshold(torch.tensor([[0.3] * 3, [0.5] * 3]))
    assert cut.taps == ("timestep",)
    assert cut(scores, x, t).tolist() == [[[2, 0, 3]], [[2, 3, 3]]]
    relative_cut = RelativeThreshold(torch.tensor([0.2, 0.6]))
    assert relative_cut(scores, x, t).tolist() == [[[2, 3, 3]], [[2, 0, 3]]]
    assert relative_cut(-scores, x, t).tolist() == [[[0, 1, 2]], [[0, 1, 2]]]
    assert RelativeThreshold(torch.tensor([1.0])).taps == ()


@pytest.mark.parametrize("recipe", ["moefx-split", "chess", "d2dmoe"])
def test_thresholds_by_timestep_where_the_block_sees_it(recipe: str, tmp_path: Path) -> None:
    """Blocks of the original DiT get the raw timestep, and their networks a threshold for each half of the steps."""
    original, inputs, calibration = dense("DiTTransformer2DModel")
    model = copy.deepcopy(original)
    options = {**RECIPES[recipe], "timestep_thresholds": 2, "max_error": 50.0}
    moefx.transform(model, inputs, recipe=recipe, calibration=calibration, **options)
    layers = [m for m in model.modules() if isinstance(m, LAYERS)]
    assert layers
    for layer in layers:
        assert layer.taps == ("timestep",)
        x, t = torch.randn(2, 5, layer_width(layer)), torch.tensor([10.0, 990.0])
        alone = torch.cat([layer(x[:1], t[:1]), layer(x[1:], t[1:])])
        assert torch.allclose(layer(x, t), alone, atol=1e-5)
    call(model, inputs)
    moefx.save(model, tmp_path / "saved")
    loaded = moefx.load(tmp_path / "saved", copy.deepcopy(original))
    assert error(call(loaded, inputs), call(model, inputs)) < 1e-6


def layer_width(layer: nn.Module) -> int:
    experts = getattr(layer, "experts", layer)
    return int(getattr(experts, "experts", experts).w_in.shape[-1])


def test_refused_with_what_to_do() -> None:
    model, calibration = calibrated()
    fresh = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"moefx\.calibrate"):
        moefx.transform(fresh, batch(0), recipe="cmoe")
    with pytest.raises(InputError, match="pass what"):
        moefx.transform(fresh, batch(0), recipe="cmoe", calibration=object())
    with pytest.raises(NothingMatched, match="not divisible by experts"):
        moefx.transform(fresh, batch(0), recipe="cmoe", calibration=calibration, experts=5)
    with pytest.raises(OptionError, match="of only"):
        moefx.transform(fresh, batch(0), recipe="cmoe", calibration=calibration, top_k=15)
    silent = moefx.calibrate(fresh, [batch(0)], buckets=6, progress=False)
    with pytest.raises(InputError, match="pass loss="):
        moefx.transform(fresh, batch(0), recipe="dense2moe", calibration=silent)
    with pytest.raises(InputError, match="multiple of as many buckets"):
        moefx.transform(fresh, batch(0), recipe="read-me", calibration=silent, experts=4)
    assert not any(isinstance(m, LAYERS) for m in fresh.modules())
    with pytest.warns(MoefxWarning, match="full size"):
        moefx.transform(fresh, batch(0), passes=["split"], calibration=silent, scale=2.0, importance="usage")

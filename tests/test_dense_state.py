"""Routed weights as dense ones and back, on modules, fused projections and single-stream blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moefx
from moefx import zoo
from moefx.errors import PlanError
from moefx.graph.inputs import synthesise
from moefx.model.dense_state import dense_to_routed, routed_to_dense
from moefx.routing import RoutedFFN
from tests.split_support import batch, convert, small_dit
from tests.test_split_models import MODELS, dense
from tests.trace_support import QUIET, call, error

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]


def blank(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    return other


@pytest.mark.parametrize("name", MODELS)
def test_a_split_model_is_its_dense_model_again_to_the_bit(name: str) -> None:
    original, inputs, calibration = dense(name)
    model = moefx.transform(
        copy.deepcopy(original), inputs, passes=["split"], calibration=calibration, experts=3, shared=1, top_k=1,
        importance="magnitude",
    )  # fmt: skip
    found = routed_to_dense(model, blank(original))
    for key, value in original.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    # And a newer dense checkpoint goes into the slices: with all of them active it is that model.
    newer = blank(original)
    dense_to_routed(newer, model)
    for layer in model.modules():
        if isinstance(layer, RoutedFFN):
            layer.selector.k = 3
    assert error(call(model, inputs), call(newer, inputs)) < 1e-4


def test_means_and_masks_come_out_too() -> None:
    for recipe, options in (
        ("moefx-split", {"experts": 12, "shared": 4, "top_k": 4, "channels": "none"}),
        ("read-me", {"experts": 3}),
        ("lazy-neuron", {}),
    ):
        original, model = convert(recipe, **options)
        found = routed_to_dense(model, blank(original))
        assert torch.allclose(found(*batch(3)), original(*batch(3)), rtol=1e-5, atol=1e-5)


def test_equal_copies_are_one_network_and_others_are_refused() -> None:
    original = small_dit()
    model = moefx.transform(copy.deepcopy(original), batch(0), recipe="virtual-groups")
    found = routed_to_dense(model, blank(original))
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), original.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        model.get_submodule("blocks.0.mlp").experts.w_in[0, 0, 0] += 1
    untouched = blank(original)
    before = copy.deepcopy(untouched.state_dict())
    with pytest.raises(PlanError, match="trained apart"):
        routed_to_dense(model, untouched)
    assert all(torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), before.values(), strict=True))
    with pytest.raises(PlanError, match="not split"):
        dense_to_routed(original, model)
    with pytest.raises(PlanError, match="not transformed"):
        routed_to_dense(small_dit(), original)
    heads = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(heads, batch=2)
    moefx.transform(heads, inputs, recipe="mixture-of-heads")
    with pytest.raises(PlanError, match="no feed-forward"):
        routed_to_dense(heads, zoo.tiny("DiTTransformer2DModel"))

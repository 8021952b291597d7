"""Every recipe on a small DiT: its router is a kernel, or the dump says what decides instead."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import moefx
from moefx import zoo
from moefx.codegen import Refusal, lowerings
from moefx.codegen.choice_lowering import ChoiceLowering
from moefx.codegen.router_lowering import RouterLowering
from moefx.codegen.targets import target
from moefx.errors import NothingMatched
from moefx.graph import trace
from moefx.graph.inputs import synthesise
from moefx.inspect.lowered import lowered_text
from moefx.recipes.base import recipes
from tests.trace_support import QUIET, tensors

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]

#: Recipes whose router is a kernel on this model, and those whose experts choose tokens.
ROUTERS = {
    *("cmoe", "d2dmoe", "deepseek-v3", "dense2moe", "diffmoe", "dit-moe", "drop-upcycling", "dynamic-top-p"),
    *("lazy-neuron", "lora-moe", "mixture-of-heads", "moa", "mode", "moe++", "moefication", "moefx-split"),
    *("read-me", "rmoe", "sparse-upcycling", "switch-dit", "timestep-upcycling", "virtual-groups"),
}
CHOICES = {"ec-dit", "moma", "nucleus"}
#: What a refusal of a router may say; each names what stands in the graph.
REASONS = re.compile(
    r"ranks tokens against each other|no scores are ranked: its experts follow from \w+|it cuts rows|"
    r"no operator of the dialect (reads its ranking|and no ranking of scores stands in it); torch's own compute it: "
    r"\w+|"
    r"no linear map gives the scores of \w+|joins its logits"
)


@functools.cache
def dense() -> tuple[Any, Any, moefx.Calibration]:
    torch.manual_seed(0)
    model = zoo.tiny("DiTTransformer2DModel", num_layers=1)
    batches = [synthesise(model, batch=batch) for batch in (4, 5)]

    def loss(output: Any, _: Any) -> Tensor:
        return sum((t.square().mean() for t in tensors(output)), torch.zeros(()))

    return model, synthesise(model, batch=2), moefx.calibrate(model, batches, loss=loss)


@pytest.mark.parametrize("name", [recipe.name for recipe in recipes()])
def test_a_router_is_a_kernel_or_says_why_not(name: str) -> None:
    model, inputs, known = dense()
    try:
        routed = moefx.transform(copy.deepcopy(model), recipe=name, inputs=inputs, verify=False, calibration=known)
    except NothingMatched:
        pytest.skip("needs what a DiT of one block has not")
    graph = trace(routed.eval(), inputs, leaf="torch")
    found = lowerings(graph)
    refused = [item for item in found if isinstance(item, Refusal) and item.kind == "router"]
    has_router = any(isinstance(item, RouterLowering) for item in found)
    assert has_router == (name in ROUTERS), [item.reason for item in refused]
    assert any(isinstance(item, ChoiceLowering) for item in found) == (name in CHOICES)
    for item in refused:
        assert REASONS.search(item.reason), item.reason
    if not found:
        assert "nothing to lower" in lowered_text(graph, target("sm_90"))

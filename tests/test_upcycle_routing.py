"""Upcycling under every way of routing: exact where the gates of copies sum to one, measured where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moefx.passes.placement.collect import TraceCollector
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3

pytestmark = support.MARKS
EXACT: dict[str, tuple[str, dict[str, Any]]] = {
    "group-limited": (DIT, {"selector": "group-limited", "select_groups": 2, "keep_groups": 1}),
    "multinomial": (DIT, {"selector": "multinomial"}),
    "top-p": (DIT, {"selector": "top-p", "top_p": 0.6}),
    "all": (DIT, {"selector": "all"}),
    "interval": (DIT, {"selector": "interval", "intervals": [4]}),
    "table": (DIT, {"scorer": "table"}),
    "experts take every token": (DIT, {"selector": "expert-choice", "capacity": 4.0}),
    "one is forced": (DIT, {"selector": "threshold", "always": [1], "threshold": 0.01}),
    "mlp": (SD3, {"scorer": "mlp", "scorer_hidden": 9}),
    "cosine on the prompt": (SD3, {"scorer": "cosine", "router_input": "token+text"}),
    "condition": (FLUX, {"router_input": "condition"}),
    "random": (DIT, {"scorer": "random"}),
    "norm": (DIT, {"scorer": "norm"}),
    "shared policy": (DIT, {"non_finite": "shared"}),
    "grained, by expert": (DIT, {"selector": "expert-choice", "capacity": 2.0, "granularity": 2}),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_starts(case: str) -> None:
    name, options = EXACT[case]
    model = support.realised("sparse-upcycling", name, **{"experts": 4} | options)
    assert all(check.contract == "exact" for check in model.moefx.report.checks)
    support.check_equal(model, name)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == model.moefx.report.plan.cost.parameters_after


@pytest.mark.parametrize("options", [{"selector": "expert-choice"}, {"selector": "threshold"}, {"scale": 2.0}])
def test_starts_that_are_not_exact_say_so(options: dict[str, Any]) -> None:
    model = support.realised("sparse-upcycling", DIT, experts=4, max_error=2.0, **options)
    assert {check.contract for check in model.moefx.report.checks} == {"approximate"}
    assert max(check.error for check in model.moefx.report.checks) > 1e-3


def test_a_text_prompt_can_be_read_and_matters() -> None:
    model = support.realised("sparse-upcycling", SD3, experts=4, router_input="token+text", router_std=1.0)
    inputs = dict(support.inputs(SD3))
    loads = []
    for scale in (1.0, -3.0):
        with torch.no_grad():
            model(**inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"] * scale})
        loads.append(torch.stack([layer.record.load for layer in support.layers(model).values()]))
    assert float((loads[0] - loads[1]).abs().max()) > 0.05


def test_traces_for_placement_count_what_experts_chose() -> None:
    model = support.realised("ec-dit", DIT, experts=4, every=1)
    with TraceCollector(model) as collector, collector.at(1.0), torch.no_grad():
        model(**support.inputs(DIT))
    trace = collector.trace()
    for index, layer in enumerate(support.layers(model).values()):
        found = torch.as_tensor(trace.load[0, index], dtype=torch.float32)
        assert float(found.sum()) > 0
        assert torch.allclose(found / found.sum(), layer.record.load)

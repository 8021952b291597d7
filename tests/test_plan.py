"""Plans: pure data about a model that is neither changed nor read."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moefx
from examples.dit import DiT
from examples.inline_dit import InlineDiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import UnsafeInputError
from moefx.model.plan import SCHEMA, Plan
from tests.trace_support import fingerprint
from tests.zoo_models import FULL

pytestmark = pytest.mark.filterwarnings("ignore::moefx.errors.MoefxWarning")
SMALL: dict[str, Any] = {
    "image_size": 8,
    "patch": 2,
    "in_channels": 3,
    "depth": 2,
    "width": 32,
    "heads": 4,
    "classes": 5,
}
INPUTS = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.arange(2))


def dit(kind: type[nn.Module] = DiT) -> nn.Module:
    torch.manual_seed(0)
    return randomise_zeros(kind(**SMALL)).eval()


@pytest.mark.parametrize("kind", [DiT, InlineDiT])
@pytest.mark.parametrize("recipe", ["sparse-upcycling", "mixture-of-heads", "timestep-upcycling", "virtual-groups"])
def test_a_plan_changes_nothing_and_foretells_the_transform(kind: type[nn.Module], recipe: str) -> None:
    model = dit(kind)
    before, random_state = fingerprint(model), torch.get_rng_state()
    plan = moefx.plan(model, INPUTS, recipe=recipe)
    assert fingerprint(model) == before
    assert torch.equal(random_state, torch.get_rng_state())
    assert plan.cost.parameters_before == sum(p.numel() for p in model.parameters())
    assert plan.cost.bytes_before == sum(p.numel() * p.element_size() for p in model.parameters())
    moefx.transform(model, INPUTS, recipe=recipe)
    assert plan == model.moefx.report.plan
    assert plan.cost.parameters_after == sum(p.numel() for p in model.parameters())
    assert plan.cost.bytes_after == sum(p.numel() * p.element_size() for p in model.parameters())


def test_weights_are_not_read() -> None:
    model = dit()
    wanted = moefx.plan(model, INPUTS)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert moefx.plan(model, INPUTS) == wanted
    assert moefx.plan(model.to("meta"), INPUTS) == wanted


def test_flops_are_those_of_the_dense_model() -> None:
    model = dit()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*INPUTS)
    plan = moefx.plan(model, INPUTS)
    # The counter of torch does not know the attention kernel of the CPU: two products of [T, T] and [T, D] per sample.
    attention = 2 * 2 * (2 * 16 * 16 * 32) * 2
    assert plan.cost.flops_before == pytest.approx(counter.get_total_flops() + attention, rel=0.01)


@pytest.mark.parametrize(
    ("options", "networks"),
    [
        ({"experts": 8, "top_k": 1}, 1),
        ({"experts": 8, "top_k": 2}, 2),
        ({"experts": 8, "top_k": 2, "granularity": 2}, 1),
        ({"experts": 8, "top_k": 2, "shared": 1}, 3),
    ],
)
def test_active_flops_are_those_of_the_experts_of_a_token(options: dict[str, Any], networks: int) -> None:
    plan = moefx.plan(dit(), INPUTS, **options)
    tokens, width, hidden, blocks = 2 * 16, 32, 128, 2
    one = 2 * tokens * 2 * width * hidden * blocks
    router = 2 * tokens * width * 8 // options.get("granularity", 1) * blocks
    assert plan.cost.flops_after - plan.cost.flops_before == (networks - 1) * one + router
    assert plan.cost.flops_ratio == plan.cost.flops_after / plan.cost.flops_before


def test_sites_and_what_stays_dense() -> None:
    plan = moefx.plan(dit(), INPUTS, skip="blocks.0*", experts=4)
    (site,) = plan.sites
    assert (site.name, site.kind, site.rule, site.tier, site.module) == (
        *("blocks.1.mlp", "ffn", "upcycle", "module"),
        "blocks.1.mlp",
    )
    assert site.parameters_before == 32 * 128 * 2 + 128 + 32
    assert site.weights == tuple(sorted(site.weights, key=site.weights.index))
    reasons = {s.name: s.reason for s in plan.skipped}
    assert reasons["blocks.0.mlp"] == "not selected"
    assert any("one vector per sample" in reason for reason in reasons.values())
    assert all(s.source for s in plan.skipped)


def test_the_same_plan_has_the_same_bytes() -> None:
    texts = {moefx.plan(dit(), INPUTS, experts=4).to_json() for _ in range(2)}
    assert len(texts) == 1
    text = texts.pop()
    assert Plan.from_json(text).to_json() == text
    assert json.loads(text)["schema_version"] == SCHEMA
    assert str(Plan.from_json(text)) == str(moefx.plan(dit(), INPUTS, experts=4))
    assert "experts=4" in str(Plan.from_json(text))


def test_an_expected_plan_cannot_be_edited_in_place() -> None:
    plan = moefx.plan(dit(), INPUTS)
    with pytest.raises(ValueError, match="frozen"):
        plan.seed = 3  # type: ignore[misc]


DAMAGE: dict[str, Any] = {
    "newer": lambda d: d | {"schema_version": SCHEMA + 1},
    "unknown key": lambda d: d | {"surprise": 1},
    "no sites": lambda d: {k: v for k, v in d.items() if k != "sites"},
    "wrong type": lambda d: d | {"seed": "abc"},
    "tier": lambda d: d | {"sites": [d["sites"][0] | {"tier": "elsewhere"}]},
    "a list": lambda d: [d],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_plans_are_refused(name: str) -> None:
    text = moefx.plan(dit(), INPUTS).to_json()
    with pytest.raises(UnsafeInputError) as caught:
        Plan.from_json(json.dumps(DAMAGE[name](json.loads(text))))
    assert caught.value.found
    assert caught.value.do


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "\0", "{}" * 3])
def test_texts_that_are_no_plans(text: str) -> None:
    with pytest.raises(UnsafeInputError):
        Plan.from_json(text)


def test_a_full_size_plan_on_meta() -> None:
    pytest.importorskip("diffusers")
    class_name, config, _ = FULL["DiT-XL/2 256"]
    model = zoo.from_config(class_name, config, device="meta")
    plan = moefx.plan(model, experts=8, top_k=2)
    assert len(plan.sites) == 28
    ffn = 2 * 1152 * 4608 + 4608 + 1152
    assert plan.sites[0].parameters_before == ffn
    grown = plan.cost.parameters_after - plan.cost.parameters_before
    assert grown == 28 * (7 * (2 * 1152 * 4608 + 4608) + 8 * 1152)
    assert 1.5 < plan.cost.flops_ratio < 1.8
    assert all(p.is_meta for p in model.parameters())

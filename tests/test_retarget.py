"""Other options for good: as if the model had been made with them, with the weights that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx import zoo
from moefx.errors import OptionError, PlanError
from moefx.graph.inputs import synthesise
from tests.transform_support import build, example, routed_modules

DIT, FLUX, UNET = "DiTTransformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"


def stirred(model: nn.Module) -> nn.Module:
    """Give a routed model weights that no start has."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.02)
    return model


def output(model: nn.Module, inputs: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**(inputs or synthesise(model)))[0]
    return found


def fresh(name: str, recipe: str, state: dict[str, Tensor], **options: Any) -> nn.Module:
    """Return the model that is made with these options at once and then gets the weights."""
    model = moefx.transform(zoo.tiny(name), recipe=recipe, verify=False, **options)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    ("name", "recipe", "before", "after"),
    [
        (DIT, "sparse-upcycling", {"top_k": 2}, {"top_k": 1}),
        (FLUX, "sparse-upcycling", {"top_k": 2}, {"top_k": 3, "normalise": "softmax_topk"}),
        (DIT, "ec-dit", {}, {"capacity": 0.5}),
        (FLUX, "moh", {}, {"active_heads": 0.5}),
        (UNET, "moh,sparse-upcycling", {"experts": 4}, {"top_k": 1}),
        (DIT, "mod", {"every": 2}, {"capacity": 0.25}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_it_is_what_the_transform_makes_with_these_options(
    name: str, recipe: str, before: dict[str, Any], after: dict[str, Any]
) -> None:
    model = stirred(moefx.transform(zoo.tiny(name), recipe=recipe, verify=False, **before))
    was, parameters = output(model), {key: id(p) for key, p in model.named_parameters()}
    model.moefx.retarget(**after)
    wanted = fresh(name, recipe, model.state_dict(), **before | after)
    assert torch.equal(output(model), output(wanted))
    assert not torch.equal(output(model), was)
    assert {key: id(p) for key, p in model.named_parameters()} == parameters
    plan, fits = model.moefx.report.plan, wanted.moefx.report.plan
    assert (plan.cost, plan.recipe) == (fits.cost, fits.recipe)
    assert [site.name for site in plan.sites] == [site.name for site in fits.sites]


def test_back_to_the_first_options_is_the_first_model_and_undo_is_exact() -> None:
    model = zoo.tiny(FLUX)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    moefx.transform(model, recipe="sparse-upcycling", top_k=2, noise=0.1, max_error=10.0)
    was, classes = output(model), [type(m) for m in model.modules()]
    model.moefx.retarget(top_k=1)
    assert not torch.equal(output(model), was)
    model.moefx.retarget(top_k=2)
    assert torch.equal(output(model), was)
    assert [type(m) for m in model.modules()] == classes
    moefx.untransform(model)
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == dense.keys()


def test_saved_and_loaded_and_then_changed_again(tmp_path: Path) -> None:
    model = stirred(moefx.transform(zoo.tiny(DIT), recipe="sparse-upcycling", top_k=2))
    model.save_pretrained(tmp_path / "two")
    model.moefx.retarget(top_k=1)
    model.save_pretrained(tmp_path / "one")
    one, two = moefx.load(tmp_path / "one"), moefx.load(tmp_path / "two")
    torch.testing.assert_close(output(one), output(model))  # loaded tensors may be aligned otherwise
    two.moefx.retarget(top_k=1)
    assert torch.equal(output(two), output(one))
    assert not any(t.is_meta for t in (*two.parameters(), *two.buffers()))
    with pytest.raises(PlanError, match="holds no dense weights"):
        moefx.untransform(two)


def test_a_loaded_model_in_half_precision_gets_the_plan_it_had(tmp_path: Path) -> None:
    model = moefx.transform(zoo.tiny(FLUX).bfloat16(), recipe="sparse-upcycling", top_k=2, verify=False)
    model.save_pretrained(tmp_path)
    loaded = moefx.load(tmp_path)
    for each in (model, loaded):
        each.moefx.retarget(top_k=1)
    one, two = model.moefx.report.plan, loaded.moefx.report.plan
    assert (one.sites, one.cost) == (two.sites, two.cost)
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in loaded.parameters()]


def test_a_loaded_model_of_ones_own_needs_the_dense_one(tmp_path: Path) -> None:
    model = stirred(moefx.transform(build(), example(), recipe="sparse-upcycling", top_k=2))
    moefx.save(model, tmp_path / "model")
    loaded = moefx.load(tmp_path / "model", build())
    with pytest.raises(PlanError, match="dense="):
        loaded.moefx.retarget(example(), top_k=1)
    loaded.moefx.retarget(example(), dense=build().to("meta"), top_k=1)
    model.moefx.retarget(example(), top_k=1)
    torch.testing.assert_close(loaded(*example()), model(*example()))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_training_goes_on_with_the_same_optimizer_and_hooks_stay() -> None:
    model = moefx.transform(build(), example(), recipe="sparse-upcycling", top_k=2).train()
    model.blocks[0].attn.requires_grad_(False)
    model.blocks[0].mlp.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    called: list[str] = []
    model.blocks[1].register_forward_hook(lambda *_: called.append("block"))
    block = model.blocks[1]
    for top_k in (2, 1):
        model.moefx.retarget(example(), top_k=top_k)
        called.clear()
        model(*example()).square().mean().backward()
        before = [p.clone() for p in model.parameters()]
        optimizer.step()
        moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
        assert sum(moved) > 20
        optimizer.zero_grad()
    assert called == ["block"]
    assert model.blocks[1] is block
    assert [(layer.top_k, layer.training) for layer in routed_modules(model)] == [(1, False), (1, True)]
    assert not any(p.requires_grad for p in model.blocks[0].attn.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4}, "tensors that it has not or of another shape"),
        ({"top_k": 9}, "top_k"),
        ({"topk": 1}, "did you mean 'top_k'"),
        ({}, "no option"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(options: dict[str, Any], message: str) -> None:
    model = moefx.transform(build(), example(), recipe="sparse-upcycling", top_k=2)
    was, modules = model(*example()), list(model.modules())
    with pytest.raises(OptionError, match=message):
        model.moefx.retarget(example(), **options)
    assert torch.equal(model(*example()), was)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.moefx.report.plan.passes[0].options["top_k"] == 2


def test_experts_that_are_elsewhere_are_refused() -> None:
    model = moefx.transform(zoo.tiny(DIT), experts=4)
    moefx.offload(model, "320KB")
    with pytest.raises(PlanError, match=r"(?s)streamed from files.*retarget first"):
        model.moefx.retarget(top_k=1)
    moefx.onload(model)
    model.moefx.retarget(top_k=1)


def test_a_model_without_routing_and_one_with_a_budget_are_refused() -> None:
    from moefx.model.retarget import retarget

    with pytest.raises(PlanError, match="it was not transformed"):
        retarget(zoo.tiny(DIT), top_k=1)
    model = moefx.transform(zoo.tiny(DIT), experts=4)
    plan = model.moefx.report.plan
    sites = tuple(site.model_copy(update={"options": {"top_k": 2}}) for site in plan.sites)
    report = model.moefx.report.model_copy(update={"plan": plan.model_copy(update={"sites": sites})})
    model.moefx.applied[-1].report = report
    with pytest.raises(PlanError, match="another budget"):
        model.moefx.retarget(top_k=1)

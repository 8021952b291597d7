"""What every recipe keeps, whatever it routes; a new file in moefx/recipes is covered as soon as it is there.

Each recipe, at its defaults, on the first small model that takes it:

- its router learns from a task loss in training and in evaluation mode, or has nothing to learn, as its row says;
- a sample's result does not depend on its batch, or its row says that it does, and then it does;
- no value of the routed path reaches the host, forward and backward: tensors on meta have none;
- it survives saving and loading to the bit, and being made once more with the options it has;
- `torch.export` and `torch.compile(fullgraph=True)` see one graph, which serves other batch sizes and sampler steps.

Sequences of one token `make test` tries for one recipe of each kind of pass; `make long` does for all, and tries every
recipe on every tiny denoiser, where it is realised or refused with the reason. What a recipe cannot keep is in its file
(`Recipe.waives`, `Choices.router`, `Choices.batch_invariant`), with the reason, and in the docs.

Elsewhere: equations and exact starts in test_recipe*.py, test_split_recipes.py and test_mixture_of_*.py; the ends of
every range in test_routing_properties.py and test_routing_edges.py; denoisers one by one in the `test_on_models` of
these files.
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import moefx
from moefx.errors import InputError, NothingMatched
from moefx.passes.rewrite.base import Pass, get_pass
from moefx.recipes import Recipe, recipes
from moefx.recipes.base import Rule
from tests import recipe_models as models
from tests import recipe_support as support
from tests.trace_support import call, error, tensors

pytestmark = support.MARKS
ALL = {recipe.name: recipe for recipe in recipes()}
LONG = bool(os.environ.get("MOEFX_LONG"))


def kind(recipe: Recipe) -> tuple[type, str]:
    """Return which class of passes/rewrite/base.py rewrites, and what: networks, attentions, blocks, whole models."""
    rule = get_pass(next(iter(recipe.passes)))
    return next(cls for cls in rule.__mro__ if cls.__module__ == Pass.__module__), rule.site_kind


KINDS = {kind(recipe): name for name, recipe in reversed(ALL.items())}
SOME = list(ALL) if LONG else sorted(KINDS.values())
GRID = [(name, fits) for name in ALL for fits in support.MODELS] if LONG else []


@pytest.mark.parametrize("name", ALL)
def test_it_learns_alone_without_the_host_and_survives_a_save(name: str, tmp_path: Path) -> None:
    recipe = ALL[name]
    fits, model = models.first_fit(recipe)
    models.stir(model)
    check_learns(recipe, model, models.MODELS[fits][1](4))
    check_batch(recipe, model, models.MODELS[fits][1](4))
    check_host(recipe, model, models.MODELS[fits][1](4))
    check_saved(model, fits, tmp_path)
    check_retarget(model, fits)


@pytest.mark.parametrize("name", ALL)
def test_one_graph(name: str) -> None:
    fits, model = models.first_fit(ALL[name])
    check_graph(ALL[name], models.stir(model), fits)


@pytest.mark.parametrize("fits", ["one token", "nine tokens"] if LONG else ["one token"])
@pytest.mark.parametrize("name", SOME)
def test_short_and_odd_sequences_one_sample_and_none(name: str, fits: str) -> None:
    try:
        model = models.stir(models.apply(ALL[name], fits))
    except (NothingMatched, InputError) as refusal:
        pytest.skip(refusal.found)
    for batch in (0, 1):
        inputs = models.MODELS[fits][1](batch)
        for training in (False, True):
            (found,) = tensors(call(model.train(training), inputs, grad=training))
            assert found.shape == inputs["x"].shape
            assert bool(found.isfinite().all())
        if batch:
            (found.square().mean() + models.auxiliary(model)).backward()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("name", "fits"), GRID)
def test_every_denoiser_is_rewritten_or_says_why_not(name: str, fits: str) -> None:
    model, reason = None, ""
    for options in ({}, models.SMALLER.get(name, {})):
        try:
            model = model or models.apply(ALL[name], fits, **options)
        except NothingMatched as refusal:
            reason = refusal.found
    if model is None:
        assert re.search(r"\n +\S+: \w+", reason), "every site that came into question has its reason"
        return
    models.stir(model)
    for batch in (2, 3):
        wanted, found = (tensors(call(m, support.inputs(fits, batch))) for m in (support.dense(fits), model))
        assert [t.shape for t in found] == [t.shape for t in wanted]
        assert all(bool(t.isfinite().all()) for t in found)
    check_learns(ALL[name], model, support.inputs(fits, 4), some=True)


def test_reasons_are_given() -> None:
    for recipe in ALL.values():
        assert set(recipe.waives) <= set(get_args(Rule))
        assert all(len(why) > 20 for why in recipe.waives.values())
    assert sum(len(recipe.waives) for recipe in ALL.values()) < len(ALL) / 8, "a contract that most waive is none"


def check_learns(recipe: Recipe, model: nn.Module, inputs: models.Inputs, *, some: bool = False) -> None:
    """Every router has the gradient its row promises; ``some`` if last blocks may throw a stream away."""
    found = models.routers(model)
    assert bool(found) == (recipe.choices.router != "none") or "gradient" in recipe.waives
    for training in (True, False):
        model.train(training).zero_grad(set_to_none=True)
        outputs = [t for t in tensors(call(model, inputs, grad=True)) if t.is_floating_point()]
        torch.stack([(t - t.detach().roll(1, 0) + 1).square().mean() for t in outputs]).sum().backward()
        moved = {path: any(p.grad is not None and bool(p.grad.any()) for p in ps) for path, ps in found.items()}
        wanted = recipe.choices.router == "learned"
        silent = [path for path, learns in moved.items() if learns != wanted]
        assert not silent or (some and len(silent) < len(moved)), (training, silent)
    model.zero_grad(set_to_none=True)
    model.eval()


def check_batch(recipe: Recipe, model: nn.Module, inputs: models.Inputs) -> None:
    """The row says truly whether the first sample's result depends on the others."""
    together, first = tensors(call(model, inputs))[0][:1], tensors(call(model, models.alone(inputs, 4)))[0]
    assert (error(together, first) < 1e-5) == recipe.choices.batch_invariant


def check_host(recipe: Recipe, model: nn.Module, inputs: models.Inputs) -> None:
    """A model without values runs and is differentiated: nothing asks for one, in either mode."""
    empty, given = models.forget(model).to("meta"), models.to_meta(inputs)
    try:
        for training in (False, True):
            wanted = tensors(call(model.train(training), inputs))[0].shape
            assert tensors(call(empty.train(training), given))[0].shape == wanted
        (tensors(call(empty, given, grad=True))[0].sum() + models.auxiliary(empty)).backward()
        read = False
    except (RuntimeError, NotImplementedError) as refused:
        if "host" not in recipe.waives:
            raise
        read = "meta" in str(refused)
    model.eval()
    assert read == ("host" in recipe.waives)


def check_saved(model: nn.Module, fits: str, folder: Path) -> None:
    """A saved model comes back with the same state and outputs."""
    moefx.save(model, folder / "model")
    loaded = moefx.load(folder / "model", models.MODELS[fits][0]()).eval()
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    inputs = models.MODELS[fits][1](3)
    # Loaded tensors may be aligned otherwise, and products then sum in another order.
    assert error(call(loaded, inputs), call(model, inputs)) < 1e-6


def check_retarget(model: nn.Module, fits: str) -> None:
    """Made once more with an option that it has, it is the same model."""
    inputs, plan = models.MODELS[fits][1], model.moefx.report.plan
    name, value = next(iter(plan.passes[0].options.items()))
    wanted, keys = tensors(call(model, inputs(3))), list(model.state_dict())
    model.moefx.retarget(inputs(2), **{name: value})
    again = model.moefx.report.plan
    assert (list(model.state_dict()), again.sites, again.cost) == (keys, plan.sites, plan.cost)
    assert all(torch.equal(a, b) for a, b in zip(tensors(call(model, inputs(3))), wanted, strict=True))


def check_graph(recipe: Recipe, model: nn.Module, fits: str) -> None:
    """One graph by export; one by compilation, which no other batch size or timestep compiles again."""
    inputs = models.MODELS[fits][1]
    if "graph" in recipe.waives:
        with pytest.raises(Exception, match=r"(?s)data-dependent|unbacked|Unsupported|_local_scalar_dense"):
            torch.export.export(copy.deepcopy(model), (), inputs(5), strict=False)
        return
    exported = torch.export.export(model, (), inputs(5), strict=False).module()
    assert error(call(exported, inputs(5)), call(model, inputs(5))) < 1e-5
    torch._dynamo.reset()  # the sizes of batches are no other sizes, which would share a symbol
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for step, given in enumerate([inputs(5), inputs(6), models.at_other_times(inputs(9))]):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert error(call(compiled, given), call(model, given)) < 1e-5

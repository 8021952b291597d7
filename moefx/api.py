"""The public verbs: trace, sites, plan, transform, verify, untransform."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import nn

from moefx.errors import InputError, OptionError
from moefx.graph import Graph, trace
from moefx.graph.signature import Inputs
from moefx.model.plan import Plan
from moefx.model.select import Patterns
from moefx.model.transform import Clock, check_model, plan_model, transform_model, untransform_model
from moefx.passes.analysis import Site, analyse
from moefx.passes.analysis.site import Miss
from moefx.passes.calibration import Calibration
from moefx.passes.rewrite import Pass, get_pass
from moefx.passes.rewrite.order import in_order
from moefx.recipes import build_passes, get_recipe

Model = TypeVar("Model", bound=nn.Module)
Passes = Sequence[str | Pass] | None


def sites(model_or_graph: nn.Module | Graph, inputs: Inputs = None) -> list[Site]:
    """Return every feed-forward network, attention and repeated block of a model, found by data flow.

    Args:
        model_or_graph: a model, or a graph from :func:`moefx.trace`.
        inputs: example inputs of a model; synthesised for diffusers denoisers.
    """
    return analyse(_graph(model_or_graph, inputs)).sites


def misses(model_or_graph: nn.Module | Graph, inputs: Inputs = None) -> list[Miss]:
    """Return what is almost a site, each with the first condition that failed."""
    return analyse(_graph(model_or_graph, inputs)).misses


def plan(
    model: nn.Module,
    inputs: Inputs = None,
    *,
    recipe: str | Sequence[str] | None = None,
    passes: Passes = None,
    only: Patterns = None,
    skip: Patterns = None,
    seed: int = 0,
    calibration: Calibration | None = None,
    budget: float | None = None,
    **options: Any,
) -> Plan:
    """Say what :func:`transform` would do, without editing anything; works on ``meta``, and reads no weight.

    With a ``budget``, which needs weights and a calibration, it chooses which sites are routed and how far, and states
    the expected cost and loss. Arguments and errors are those of :func:`transform`.
    """
    rules, name, budget = _request(recipe, passes, budget, calibration, options)
    check_model(model, rules)
    _, made = plan_model(
        model,
        inputs,
        rules,
        recipe=name,
        only=only,
        skip=skip,
        seed=_seed(seed),
        clock=Clock(),
        budget=budget,
        calibration=calibration,
    )
    return made


def transform(
    model: Model,
    inputs: Inputs = None,
    *,
    recipe: str | Sequence[str] | None = None,
    passes: Passes = None,
    only: Patterns = None,
    skip: Patterns = None,
    verify: bool = True,
    seed: int = 0,
    calibration: Calibration | None = None,
    budget: float | None = None,
    **options: Any,
) -> Model:
    """Rewrite a dense model into a routed one, in place, and return it.

    The object stays the user's own: class, signature, configuration and the names of untouched parameters are kept;
    ``model.moefx.report`` is the receipt. Either everything is applied or nothing.

    Args:
        model: the dense model.
        inputs: example inputs: a dict of keyword arguments, a tuple of positional ones, or ``(tuple, dict)``.
            Synthesised for diffusers denoisers and for models with a registered input maker.
        recipe: a name that ``moefx recipes`` lists, or several to compose, as a list or with commas between;
            ``sparse-upcycling`` by default, with a budget ``moefx-split``.
        passes: pass names or pass objects to use instead of a recipe.
        only: site kinds, names or globs to rewrite; all by default.
        skip: site kinds, names or globs to leave dense.
        verify: check each site and the whole model against the dense original.
        seed: of everything random; the same seed gives the same model.
        calibration: what :func:`moefx.calibrate` measured; recipes that split a dense network need it.
        budget: active FLOPs of the whole model over those of the dense one: which networks are split, which heads and
            tokens are routed, and how far, is chosen from the calibration so that the expected loss is least. Without
            a calibration, recipes with a budget of their own, such as ``dydit``, take it as theirs and learn it.
        options: options of the recipe's passes, such as ``experts=8`` or ``top_k=2``.

    Raises:
        InputError: the model or its inputs are unusable.
        CaptureError: the model cannot be traced faithfully.
        OptionError: an option or recipe is unknown or impossible.
        NothingMatched: nothing would be rewritten.
        PlanError: the model was transformed by the same pass before.
        VerifyError: a contract does not hold; the model is as it was.
    """
    if not isinstance(verify, bool):
        raise InputError("transform a model", found=f"verify = {verify!r}", do="pass True or False")
    rules, name, budget = _request(recipe, passes, budget, calibration, options)
    transform_model(
        model,
        inputs,
        rules,
        recipe=name,
        only=only,
        skip=skip,
        seed=_seed(seed),
        verify=verify,
        calibration=calibration,
        budget=budget,
    )
    return model


def untransform(model: Model) -> Model:
    """Put a transformed model back, to the bit as it was before :func:`transform`; training since then is lost.

    Raises:
        PlanError: it was not transformed, or loaded from a folder that holds no dense weights.
    """
    if not isinstance(model, nn.Module):
        raise InputError("untransform a model", found=f"a {type(model).__name__}", do="pass a torch.nn.Module")
    untransform_model(model)
    return model


def _graph(model_or_graph: nn.Module | Graph, inputs: Inputs) -> Graph:
    return model_or_graph if isinstance(model_or_graph, Graph) else trace(model_or_graph, inputs)


def _request(
    recipe: str | Sequence[str] | None,
    passes: Passes,
    budget: float | None,
    calibration: Calibration | None,
    options: dict[str, Any],
) -> tuple[list[Pass], str | None, float | None]:
    """Return the passes, the recipe's name, and the budget where it is not an option of the passes themselves."""
    if passes is not None:
        return _rules(passes, options), None, budget
    if recipe is None:
        recipe = "sparse-upcycling" if budget is None else "moefx-split"
    names = [recipe] if isinstance(recipe, str) else recipe
    if not isinstance(names, Sequence) or not names or not all(isinstance(name, str) for name in names):
        raise OptionError("choose a recipe", found=f"{recipe!r}", do="pass its name, or a list of names")
    chosen = get_recipe(",".join(names))
    learnt = any("budget" in get_pass(name).Options.model_fields for name in chosen.passes)
    if budget is not None and learnt and calibration is None:
        options, budget = {**options, "budget": budget}, None
    return in_order(build_passes(chosen.passes, options)), chosen.name, budget


def _rules(passes: Passes, options: dict[str, Any]) -> list[Pass]:
    if isinstance(passes, str) or not isinstance(passes, Sequence) or not passes:
        raise OptionError("choose passes", found=repr(passes), do="pass a non-empty list of names or Pass objects")
    named: dict[str, dict[str, Any]] = {}
    for item in passes:
        if isinstance(item, str):
            if get_pass(item).name in named:
                raise OptionError("choose passes", found=f"{item!r} twice", do="name each pass once")
            named[item] = {}
        elif not isinstance(item, Pass):
            raise OptionError("choose passes", found=f"{type(item).__name__}", do="pass names or Pass objects")
    return in_order([*build_passes(named, options), *(p for p in passes if isinstance(p, Pass))])


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError("seed a transform", found=f"{seed!r}", do="pass an integer")
    if not 0 <= seed < 2**63:
        raise InputError("seed a transform", found=f"{seed}", do="pass an integer from 0 to 2**63 - 1")
    return seed

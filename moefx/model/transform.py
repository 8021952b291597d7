"""Plan → validate → apply: all or nothing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from moefx.errors import InputError, MoefxWarning, PlanError, VerifyError
from moefx.graph import Graph, trace
from moefx.graph.signature import Inputs
from moefx.model.budget import within_budget
from moefx.model.captures import Captures
from moefx.model.diffusers import as_saved_class
from moefx.model.handle import ATTRIBUTE, Applied, Handle, applied_passes, handle_of
from moefx.model.install import apply_changes, undo_changes
from moefx.model.plan import Plan
from moefx.model.planner import make_plan
from moefx.model.realise import Realised, realise
from moefx.model.report import Report
from moefx.model.select import Patterns
from moefx.model.verify import (
    TOLERANCE,
    check_blocks,
    check_sites,
    check_weights,
    compare_models,
    rounding,
    run,
    run_dense,
)
from moefx.passes.analysis import analyse
from moefx.passes.calibration import Calibration
from moefx.passes.rewrite.base import Pass
from moefx.routing.switch import ModelSwitch


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def check_model(model: object, rules: Sequence[Pass]) -> nn.Module:
    """Refuse what is no module, and what the same passes were applied to already.

    Raises:
        InputError, PlanError
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "transform a model", found=f"an object of type {type(model).__name__}", do="pass a torch.nn.Module"
        )
    again = sorted(applied_passes(model) & {rule.name for rule in rules})
    if again:
        raise PlanError(
            f"apply {', '.join(again)} to {type(model).__name__}",
            found="it was transformed by the same pass before",
            do="use it as it is, or call moefx.untransform(model) first",
        )
    if any(isinstance(child, ModelSwitch) for child in model.children()):
        raise PlanError(
            f"rewrite the inside of {type(model).__name__}",
            found="a switch between two whole models, of which a pass would see one",
            do="transform the inside first, and switch models in the last transform",
        )
    return model


def plan_model(
    model: nn.Module,
    inputs: Inputs,
    rules: Sequence[Pass],
    *,
    recipe: str | None,
    only: Patterns,
    skip: Patterns,
    seed: int,
    clock: Clock,
    budget: float | None = None,
    calibration: Calibration | None = None,
) -> tuple[Graph, Plan]:
    """Trace, analyse and plan."""
    with clock.stage("trace"):
        graph = trace(model, inputs)
    with clock.stage("plan"):
        wide = budget is not None
        plan = make_plan(graph, rules, recipe=recipe, only=only, skip=skip, seed=seed, nested=wide)
        if budget is not None:
            plan = within_budget(analyse(graph), plan, rules, budget, calibration)
    return graph, plan


def transform_model(
    model: nn.Module,
    inputs: Inputs,
    rules: Sequence[Pass],
    *,
    recipe: str | None,
    only: Patterns,
    skip: Patterns,
    seed: int,
    verify: bool,
    calibration: Calibration | None = None,
    budget: float | None = None,
) -> nn.Module:
    """Apply ``rules`` to ``model`` in place and return it; a failure leaves it as it was."""
    clock = Clock()
    check_model(model, rules)
    _check_calibration(rules, calibration)
    graph, plan = plan_model(
        model,
        inputs,
        rules,
        recipe=recipe,
        only=only,
        skip=skip,
        seed=seed,
        clock=clock,
        budget=budget,
        calibration=calibration,
    )
    with clock.stage("verify"):
        check_weights(graph, [name for site in plan.sites for name in site.weights])
    meta = any(p.is_meta for p in model.parameters())
    assert graph.call_spec is not None
    call = graph.call_spec.rebuild(graph.call_spec.examples)
    whole = verify and not meta
    with clock.stage("verify"):
        before = run_dense(model, *call) if whole else []
    with clock.stage("rewrite"):
        changes, built = realise(model, plan, calibration, Captures.of(graph))
    with clock.stage("verify"):
        checks = [*check_sites(built, seed), *check_blocks(model, plan, changes, built, seed)] if whole else []
    # Before anything is changed: warnings may be errors.
    for warning in plan.warnings:
        warnings.warn(warning, MoefxWarning, stacklevel=4)
    was = type(model)
    with clock.stage("rewrite"):
        undos = apply_changes(model, changes)
    try:
        with clock.stage("verify"):
            error = compare_models(before, run(model, *call)) if whole else None
        bound = _model_bound(graph, built)
        if error is not None and not error <= bound:
            raise VerifyError(
                f"transform {type(model).__name__}",
                found=f"the whole model's output changed by {error:.3g} (relative), at most {bound:.2g} was promised",
                do="report this as a bug; the model was put back as it was",
            )
        report = Report(
            plan=plan,
            checks=tuple(checks),
            model_error=error,
            model_bound=bound if whole else None,
            unverified="" if whole else "the weights are on meta" if meta else "verify=False",
            seconds=clock.seconds,
        )
        attach(model, Applied(report, undos, was))
        if calibration is not None:
            model.__dict__[ATTRIBUTE].calibration = calibration
    except BaseException:
        undo_changes(model, undos)
        raise
    return model


def _check_calibration(rules: Sequence[Pass], calibration: object) -> None:
    needy = [rule.name for rule in rules if rule.needs_calibration]
    if needy and calibration is None:
        raise InputError(
            f"apply {', '.join(needy)} with these options",
            found="no calibration",
            do="pass calibration=moefx.calibrate(model, batches)",
        )
    if calibration is not None and not isinstance(calibration, Calibration):
        raise InputError(
            "use a calibration", found=f"a {type(calibration).__name__}", do="pass what moefx.calibrate returned"
        )


def _model_bound(graph: Graph, built: Sequence[Realised]) -> float:
    """Rounding accumulates over the sites; an approximate start is bounded site by site only."""
    if any(made.rule.contract().kind != "exact" for made in built):
        return float("inf")
    dtypes = [p.dtype for p in graph.root.parameters() if p.dtype in TOLERANCE]
    return max((rounding(graph, d) for d in dtypes), default=1e-5) * max(1, len(built))


def attach(model: nn.Module, applied: Applied) -> None:
    """Give ``model`` its namespace ``model.moefx`` and, if it comes from diffusers, a class that only moefx loads."""
    was, handle = type(model), handle_of(model) or Handle(model)
    handle.applied.append(applied)
    model.__dict__[ATTRIBUTE] = handle
    try:
        as_saved_class(model)
    except BaseException:
        model.__class__ = was
        handle.applied.pop()
        if not handle.applied:
            del model.__dict__[ATTRIBUTE]
        raise


def untransform_model(model: nn.Module) -> nn.Module:
    """Undo every transform of ``model``, last first, and return it.

    Raises:
        PlanError: it was not transformed here, so the dense modules are not at hand.
    """
    handle = handle_of(model)
    if handle is None:
        raise PlanError(
            f"untransform {type(model).__name__}",
            found="it was not transformed",
            do="pass what moefx.transform returned",
        )
    if not handle.undoable:
        raise PlanError(
            f"untransform {type(model).__name__}",
            found="it was loaded from a folder, which holds no dense weights",
            do="load the dense model instead",
        )
    for applied in reversed(handle.applied):
        assert applied.undos is not None
        undo_changes(model, applied.undos)
        model.__class__ = applied.model_class
    del model.__dict__[ATTRIBUTE]
    return model

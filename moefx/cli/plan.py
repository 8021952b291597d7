"""``moefx plan``."""

from __future__ import annotations

from moefx.cli import options as o
from moefx.cli.frame import emit, working


def plan(
    model: o.Model,
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
    calibration: o.CalibrationFile = None,
    budget: o.Budget = None,
    only: o.Only = None,
    skip: o.Skip = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    meta: o.Meta = False,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Say what a recipe would do: sites, parameters, FLOPs, warnings. Edits nothing, reads no weights.

    With --budget and --calibration it chooses which networks are split, which heads and tokens are routed, and how far.
    The default recipe is sparse-upcycling, with a budget moefx-split. Exits with 3 if nothing would be rewritten.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx import api
        from moefx.cli.models import build
        from moefx.inspect import schema
        from moefx.inspect.dump import dump as dump_model

        chosen = o.pass_options(option, recipe, budget)
        built, given = build(model, config=config, meta=meta, seed=seed, inputs=inputs)
        if budget is not None:
            found = o.load_calibration(calibration)
            made = api.plan(
                built, given, recipe=recipe, only=only or None, skip=skip or None, seed=seed, calibration=found,
                budget=budget, **chosen,
            )  # fmt: skip
            text = schema.to_text(schema.head("plan") | {"plan": made.model_dump(mode="json")}) if json else str(made)
        else:
            text = dump_model(
                built, given, stage="plan", format="json" if json else "text", recipe=recipe, only=only or None,
                skip=skip or None, seed=seed, **chosen,
            )  # fmt: skip
    emit(text, out)

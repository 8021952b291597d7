"""``moefx bisect``."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working

if TYPE_CHECKING:
    from torch import nn


def bisect(
    model: o.Model,
    error: Annotated[
        float | None,
        typer.Option("--error", min=0.0, help="Wrong is also a relative error of the output above this."),
    ] = None,
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
    calibration: o.CalibrationFile = None,
    only: o.Only = None,
    skip: o.Skip = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Find the first site at which a rewrite goes wrong: at which its contract does not hold, or the output is off."""
    with working(o.verbosity(quiet, verbose)):
        from moefx import bisection
        from moefx.cli.models import build
        from moefx.inspect.stages import DEFAULT_RECIPE

        built, given = build(model, config=config, seed=seed, inputs=inputs)
        wrong = None if error is None else _compared(built, given, error)
        chosen: dict[str, Any] = o.pass_options(option, recipe) | {"calibration": o.load_calibration(calibration)}
        chosen |= {"recipe": recipe or DEFAULT_RECIPE, "only": only or None, "skip": skip or None, "seed": seed}
        found = bisection.bisect(built, given, wrong=wrong, **chosen)
    if json:
        data = {"format": "moefx.bisect", "schema_version": 1, "culprit": None if found is None else asdict(found)}
        emit(json_module.dumps(data, indent=1) + "\n", out)
    else:
        emit(f"{'no site is wrong' if found is None else found}\n", out)


def _compared(model: nn.Module, inputs: Any, limit: float) -> Callable[[nn.Module], str | None]:
    """Return a check of the output against what the dense model gives now."""
    import torch

    from moefx.graph.inputs import synthesise
    from moefx.graph.signature import normalise_inputs
    from moefx.model.verify import compare_models, run

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        args, kwargs = normalise_inputs(model, synthesise(model) if inputs is None else inputs)
    wanted = run(model, args, kwargs)

    def wrong(found: nn.Module) -> str | None:
        error = compare_models(wanted, run(found, args, kwargs))
        return None if error <= limit else f"relative error {error:.3g} of the output, above {limit:g}"

    return wrong

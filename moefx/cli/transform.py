"""``moefx transform``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working


def transform(
    model: o.Model,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Folder to save the routed model in.", rich_help_panel="Output"),
    ],
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
    calibration: o.CalibrationFile = None,
    budget: o.Budget = None,
    only: o.Only = None,
    skip: o.Skip = None,
    seed: o.Seed = 0,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the contracts before saving.", rich_help_panel="Rewrite")
    ] = True,
    config: o.Config = None,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Rewrite a model, check it against the dense one, and save it; the receipt goes to stdout.

    The folder holds safetensors, config and plan, never a pickle; an older save there is replaced as a whole.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx import api
        from moefx.cli.models import build
        from moefx.model.handle import handle_of
        from moefx.model.save import save

        chosen = o.pass_options(option, recipe, budget)
        built, given = build(model, config=config, seed=seed, inputs=inputs)
        api.transform(
            built, given, recipe=recipe, only=only or None, skip=skip or None, verify=verify, seed=seed,
            calibration=o.load_calibration(calibration), budget=budget, **chosen,
        )  # fmt: skip
        save(built, out)
        handle = handle_of(built)
        assert handle is not None
        report = handle.report
        typer.echo(f"saved {out}", err=True)
    if json:
        receipt = {"format": "moefx.report", "schema_version": 1, "folder": str(out)}
        emit(json_module.dumps(receipt | {"report": report.model_dump(mode="json")}, indent=1) + "\n")
    else:
        emit(str(report))

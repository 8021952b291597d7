"""``moefx calibrate``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working


def calibrate(
    model: o.Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="File to write, safetensors.", rich_help_panel="Output")
    ],
    batches: Annotated[
        str | None,
        typer.Option(
            "--batches",
            metavar="MODULE:FUNCTION",
            help="A callable: takes the model, returns batches of inputs, or a dict of batches by guidance branch.",
            rich_help_panel="Data",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="MODULE:FUNCTION",
            help="A callable: maps the model's output and a batch to a scalar; its gradient says what matters.",
            rich_help_panel="Data",
        ),
    ] = None,
    synthetic: Annotated[
        int, typer.Option("--synthetic", min=0, help="Random batches instead of data.", rich_help_panel="Data")
    ] = 0,
    buckets: Annotated[
        int, typer.Option("--buckets", min=1, help="Parts of the range of timesteps.", rich_help_panel="Data")
    ] = 8,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Tokens kept per layer.", rich_help_panel="Data")
    ] = 2048,
    seed: o.Seed = 0,
    config: o.Config = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Collect the statistics of a model's networks, heads and tokens on data, for --calibration of plan and transform.

    The progress bar goes to stderr, a summary to stdout. Random batches show that things work; they say nothing about a
    model.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx.cli.models import build, load_callable, random_batches
        from moefx.errors import OptionError
        from moefx.passes.calibration import calibrate as collect

        if (batches is None) == (synthetic == 0):
            raise OptionError("calibrate a model", found="no data, or two kinds", do="give --batches or --synthetic N")
        built, _ = build(model, config=config, seed=seed)
        data = load_callable(batches)(built) if batches else random_batches(built, synthetic, seed)
        judge = load_callable(loss) if loss else None
        found = collect(built, data, loss=judge, buckets=buckets, samples=samples, seed=seed, progress=not quiet)
        found.save(out)
        typer.echo(f"saved {out}", err=True)
    layers = {
        name: {"tokens": layer.count, "width": layer.sizes[0], "hidden": layer.sizes[1], "kept": len(layer.sample.x)}
        for name, layer in found.layers.items()
    }
    if json:
        head = {"format": "moefx.calibration", "schema_version": 1, "file": str(out), "model": found.model}
        facts = {"buckets": found.buckets, "span": list(found.span), "branches": list(found.branches)}
        emit(json_module.dumps(head | facts | {"layers": layers, "skipped": found.skipped}, indent=1) + "\n")
        return
    rows = [f"  {n}: {f['tokens']} tokens, {f['width']} -> {f['hidden']}, {f['kept']} kept" for n, f in layers.items()]
    rows += [f"  {name}: skipped, {why}" for name, why in found.skipped.items()]
    emit("\n".join([repr(found), *rows]) + "\n")

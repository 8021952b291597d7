"""``moefx sites``."""

from __future__ import annotations

from typing import Annotated

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working


def sites(
    model: o.Model,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="SITE", help="Say why SITE matched, or what failed.", rich_help_panel="Output"
        ),
    ] = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    meta: o.Meta = False,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """List every feed-forward network, attention and block of a model, and what is almost one."""
    with working(o.verbosity(quiet, verbose)):
        from moefx.cli.models import build
        from moefx.inspect.dump import dump as dump_model

        built, given = build(model, config=config, meta=meta, seed=seed, inputs=inputs)
        text = dump_model(built, given, stage="sites", format="json" if json else "text", explain=explain)
    emit(text, out)

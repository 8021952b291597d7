"""``moefx dump``."""

from __future__ import annotations

from typing import Annotated

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working


def dump(
    model: o.Model,
    stage: o.Stage = "tree",
    format: o.Format = None,
    target: o.Target = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Show what the rewrite changes instead.", rich_help_panel="Output")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="SITE", help="Say why SITE matched, or what failed.", rich_help_panel="Output"
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Levels of the tree to show.", rich_help_panel="Output")
    ] = None,
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
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
    """Show a model: blocks, sites, shapes, what is routed and why not.

    The default is the region tree, one line per block, repeats folded. Name a recipe to see what it would do;
    [bold]--stage routed[/bold] applies it to a copy, [bold]--diff[/bold] compares, [bold]--stage lowered[/bold] says
    which kernels compute it, or why none do. The same input gives the same bytes.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx.cli.models import build
        from moefx.inspect.dump import check_stage
        from moefx.inspect.dump import dump as dump_model

        kind = o.output_format(format, json)
        if not (diff or explain):
            check_stage(stage, kind)
        chosen = o.pass_options(option, recipe)
        built, given = build(model, config=config, meta=meta, seed=seed, inputs=inputs)
        text = dump_model(
            built, given, stage=stage, format=kind, recipe=recipe, only=only or None, skip=skip or None, seed=seed,
            depth=depth, diff=diff, explain=explain, target=target, **chosen,
        )  # fmt: skip
    emit(text, out)

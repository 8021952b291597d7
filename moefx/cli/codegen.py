"""``moefx codegen``."""

from __future__ import annotations

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working
from moefx.errors import InputError

if TYPE_CHECKING:
    from moefx.codegen.bundle import Built
    from moefx.codegen.spec import Kernel
    from moefx.inspect.lowered import KernelUse, RegionUse

_KERNELS = "Kernels"
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target", help=f"Device: {', '.join(o.TARGET_NAMES)}; repeat for more. Default sm_90.",
        autocompletion=lambda incomplete: [n for n in o.TARGET_NAMES if n.startswith(incomplete)],
        rich_help_panel=_KERNELS,
    ),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Compute in bfloat16, float16 or float32, not in the model's.", rich_help_panel=_KERNELS
    ),
]
Load = Annotated[
    int | None,
    typer.Option(
        "--load", min=1, help="Rows per expert to choose tiles for, not the example's.", rich_help_panel=_KERNELS
    ),
]
Training = Annotated[
    bool, typer.Option("--training", help="Kernels of the backward pass as well.", rich_help_panel=_KERNELS)
]


def codegen(
    model: o.Model,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Folder to write the kernels into.", rich_help_panel="Output"),
    ],
    target: Targets = None,
    dtype: Dtype = None,
    load: Load = None,
    training: Training = False,
    recipe: o.RecipeName = None,
    option: o.PassOptions = None,
    only: o.Only = None,
    skip: o.Skip = None,
    seed: o.Seed = 0,
    config: o.Config = None,
    meta: o.Meta = False,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Write the kernels of a routed model for a GPU that need not be here: sources, binaries, resources.

    FOLDER/TARGET/ holds one stand-alone Python module and its binaries for each kernel, FOLDER/resources.json what they
    need: registers, spills, shared memory, matrix instructions, whether warps divide. Exits with 4 if a kernel does not
    compile, or spills, in every configuration.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx.codegen import bundle

        uses, others = _kernels(model, recipe, option, only, skip, seed, config, meta, inputs)
        uses = [use.with_dtype(dtype).with_load(load) for use in uses]
        kernels = [one.with_dtype(dtype) for use in others for one in (use.training if training else use.kernels)]
        built = _build(uses, kernels, target or ["sm_90"], training, quiet)
        try:
            files = bundle.write(built, out)
        except OSError as error:
            found = error.strerror or type(error).__name__
            raise InputError(f"write {str(out)!r}", found=found, do="choose another --out") from error
        typer.echo(f"wrote {len(files)} files to {out}", err=True)
    if json:
        emit(json_module.dumps(bundle.document(built), indent=1) + "\n")
    else:
        emit(_table(built))
    if any(one.problems for one in built):
        raise typer.Exit(4)


def _kernels(
    model: str, recipe: str | None, option: list[str] | None, only: list[str] | None, skip: list[str] | None,
    seed: int, config: Path | None, meta: bool, inputs: str | None,
) -> tuple[list[RegionUse], list[KernelUse]]:  # fmt: skip
    """Return what of the model has kernels after the recipe: routed regions, and what stands beside them."""
    from moefx.cli.models import build
    from moefx.inspect.lowered import kernels_of
    from moefx.inspect.stages import Request, graph_of, opened_graph

    chosen = o.pass_options(option, recipe)
    built, given = build(model, config=config, meta=meta, seed=seed, inputs=inputs)
    request = Request(recipe=recipe, options=chosen, only=only or None, skip=skip or None, seed=seed)
    return kernels_of(opened_graph(graph_of(built, given), request))


def _build(uses: list[RegionUse], others: list[Kernel], names: list[str], training: bool, quiet: bool) -> list[Built]:
    """Compile for every target, with a progress bar where a person watches."""
    from tqdm import tqdm

    from moefx.codegen import bundle
    from moefx.codegen.targets import target as target_named

    targets = [target_named(name) for name in dict.fromkeys(names)]
    regions = [(use.region, use.rows, use.experts) for use in uses]
    total = bundle.count(regions, targets, training, others)
    with tqdm(total=total, unit="kernel", file=sys.stderr, disable=True if quiet else None) as bar:
        return bundle.build(regions, targets, training, bar.update, others)


def _table(built: list[Built]) -> str:
    """Return the resource table as text, and below it what was pruned or is wrong."""
    from moefx.inspect.tables import table_text

    columns = [("target", "left"), ("kernel", "left"), ("reg", "right"), ("spill B", "right"), ("shared B", "right")]
    columns += [("warps", "right"), ("matrix", "left"), ("divided", "left")]
    rows = []
    for one in built:
        row = one.row()
        matrix = " ".join(f"{name}:{count}" for name, count in row.get("matrix", {}).items())
        numbers = (row.get(key, "-") for key in ("registers", "spill_bytes", "shared_bytes", "warps"))
        rows.append((row["target"], row["kernel"], *numbers, matrix, "yes" if row.get("divided_warps") else ""))
    text = table_text(f"{len(built)} kernels", columns, rows)
    notes: list[Any] = [f"pruned for {b.name} on {b.target.name}: {how}: {why}" for b in built for how, why in b.pruned]
    notes += [f"problem: {problem}" for one in built for problem in one.problems]
    return text + "".join(f"{' '.join(str(note).split())[:300]}\n" for note in notes)

"""``moefx trace``."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working
from moefx.cli.tables import rendered, table

if TYPE_CHECKING:
    from moefx.passes.placement.trace import RoutingTrace

_DRAWN = "Drawn traces"


def trace(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A trace (.npz), zipf, planted or drifting to draw one, or a MODEL.")
    ],
    runs: Annotated[
        str | None,
        typer.Option(
            "--runs",
            metavar="MODULE:FUNCTION",
            help="For a MODEL: takes it and yields (sigma, inputs) of each step to run.",
        ),
    ] = None,
    branches: Annotated[
        int, typer.Option("--branches", min=1, max=2, help="2: batches hold both guidance branches.")
    ] = 1,
    merge: Annotated[list[Path] | None, typer.Option("--merge", help="Add this trace; repeat for more.")] = None,
    levels: Annotated[int, typer.Option("--levels", min=1, rich_help_panel=_DRAWN, help="Noise levels.")] = 16,
    layers: Annotated[int, typer.Option("--layers", min=1, rich_help_panel=_DRAWN, help="Routed layers.")] = 4,
    experts: Annotated[int, typer.Option("--experts", min=1, rich_help_panel=_DRAWN, help="Experts per layer.")] = 16,
    top_k: Annotated[int, typer.Option("--top-k", min=1, rich_help_panel=_DRAWN, help="Experts per token.")] = 2,
    seed: o.Seed = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the trace to this .npz.", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it to this .png or .svg.", rich_help_panel="Output")
    ] = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Show what the routers of a model did, by noise level; collect, draw, merge, save and plot such traces."""
    with working(o.verbosity(quiet, verbose)):
        from moefx.passes.placement.synthesise import KINDS, synthesise
        from moefx.passes.placement.trace import RoutingTrace

        if source in KINDS:
            drawn = {"levels": levels, "layers": layers, "experts": experts, "top_k": top_k, "seed": seed}
            found = synthesise(source, groups=min(4, experts), **drawn)
        elif source.endswith(".npz"):
            found = RoutingTrace.open(source)
        else:
            found = _collect(source, runs, branches, seed)
        for path in merge or []:
            found = found.merge(RoutingTrace.open(path))
        if save is not None:
            found.save(save)
        if plot is not None:
            from moefx.cli.plots import draw_trace

            draw_trace(found, plot)
        text = json_module.dumps(_data(found), indent=1) + "\n" if json else _text(found)
    emit(text, out)


def _collect(source: str, runs: str | None, branches: int, seed: int) -> RoutingTrace:
    """Run a model as ``runs`` says and count."""
    import torch

    from moefx.cli.models import build
    from moefx.errors import InputError
    from moefx.passes.placement.collect import TraceCollector

    if runs is None:
        raise InputError(
            f"collect a trace of {source!r}",
            found="no runs",
            do="give --runs MODULE:FUNCTION, a function that takes the model and yields (sigma, inputs)",
        )
    model, steps = build(source, seed=seed, inputs=runs)
    with TraceCollector(model, branches=branches) as collector, torch.no_grad():
        for sigma, inputs in steps:
            with collector.at(sigma):
                model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return collector.trace()


def _data(found: RoutingTrace) -> dict[str, Any]:
    head: dict[str, Any] = {"format": "moefx.trace", "schema_version": 1}
    return head | {"sigmas": found.sigmas.tolist(), "layers": [_layer(found, i) for i in range(len(found.layers))]}


def _layer(found: RoutingTrace, i: int) -> dict[str, Any]:
    """Return the figures of one layer; None where the trace has no such counts."""

    load = found.layer(i)
    mean_S = load.mean(axis=1)
    used = mean_S > 0
    ratios = load.max(axis=1)[used] / mean_S[used]
    summed = load.sum(axis=0)
    return {
        "name": found.layers[i],
        "experts": found.experts[i],
        "rows": float(load.sum()),
        "hottest": int(summed.argmax()),
        "max_over_mean_of_summed_load": float(summed.max() / summed.mean()) if summed.any() else None,
        "max_over_mean": float(ratios.mean()) if len(ratios) else None,
        "max_over_mean_worst": float(ratios.max()) if len(ratios) else None,
        "kept_between_levels": _ratio(found.persistence, i),
        "shared_between_branches": _ratio(found.overlap, i),
        "in_four_successors": _in_four(found, i),
    }


def _ratio(counts_SL2: Any, i: int) -> float | None:
    if counts_SL2 is None:
        return None
    same, compared = counts_SL2[:, i].sum(axis=0)
    return float(same / compared) if compared else None


def _in_four(found: RoutingTrace, i: int) -> float | None:
    """Return the share of a layer's flow that goes to the four likeliest successors of each expert."""
    import numpy as np

    if found.affinity is None or i + 1 == len(found.layers) or not found.affinity[i].any():
        return None
    flow_EE = found.affinity[i]
    return float(np.sort(flow_EE, axis=1)[:, -4:].sum() / flow_EE.sum())


def _text(found: RoutingTrace) -> str:
    def text(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            d["name"], str(d["experts"]), f"{d['rows']:.0f}", str(d["hottest"]),
            text(d["max_over_mean_of_summed_load"]), text(d["max_over_mean"]),
            text(d["max_over_mean_worst"]), text(d["kept_between_levels"], ".0%"),
            text(d["shared_between_branches"], ".0%"), text(d["in_four_successors"], ".0%"),
        ]
        for d in (_layer(found, i) for i in range(len(found.layers)))
    ]  # fmt: skip
    columns = ["layer", "experts", "rows", "hottest", "max/mean of sums", "of levels", "worst"]
    columns += ["kept", "both branches", "4 successors"]
    title = f"{len(found.sigmas)} noise levels from {found.sigmas[0]:.4g} to {found.sigmas[-1]:.4g}"
    return rendered(table(title, columns, rows))

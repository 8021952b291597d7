"""``moefx place``."""

from __future__ import annotations

import json as json_module
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working
from moefx.cli.tables import bytes_text, rendered, seconds_text, table
from moefx.errors import MoefxError, OptionError

if TYPE_CHECKING:
    from moefx.passes.placement import Budget, ModelDims, Placement, RoutingTrace, Topology
    from moefx.passes.placement.predict import Prediction

_BUDGET, _SIZES = "Budget", "Sizes of the experts"
_LINKS_SHOWN = 8


def _strategies(incomplete: str) -> list[str]:
    from moefx.passes.placement import strategies

    return [name for name in [*(s.name for s in strategies()), "all"] if name.startswith(incomplete)]


def place(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace, from moefx trace --save.")],
    on: Annotated[str, typer.Option("--on", metavar="TOPOLOGY", help="As moefx topology takes it.")] = "processes:2",
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="How; all compares them.", autocompletion=_strategies)
    ] = "minimax_time",
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The routed model.", rich_help_panel=_SIZES)
    ] = None,
    width: Annotated[int, typer.Option("--width", help="Without a model: width of a row.", rich_help_panel=_SIZES)] = 0,
    hidden: Annotated[int, typer.Option("--hidden", help="Hidden width of an expert.", rich_help_panel=_SIZES)] = 0,
    gated: Annotated[
        bool, typer.Option("--gated", help="Experts have three matrices.", rich_help_panel=_SIZES)
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="6GB", help="Of weights per device.", rich_help_panel=_BUDGET)
    ] = None,
    copies: Annotated[
        float, typer.Option("--copies", help="Of each weight: 4 for AdamW.", rich_help_panel=_BUDGET)
    ] = 1.0,
    spare: Annotated[
        int | None, typer.Option("--spare", help="Slots for copies per device.", rich_help_panel=_BUDGET)
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Most layouts in a run.", rich_help_panel=_BUDGET)] = 4,
    imbalance: Annotated[float, typer.Option("--imbalance", help="Allowed by joint.", rich_help_panel=_BUDGET)] = 0.05,
    restarts: Annotated[int, typer.Option("--restarts", help="Of local searches.", rich_help_panel=_BUDGET)] = 8,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Per search.", rich_help_panel=_BUDGET)] = None,
    seed: o.Seed = 0,
    save: Annotated[
        Path | None, typer.Option("--save", help="Write the plan to this file.", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it to this .png or .svg.", rich_help_panel="Output")
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", help="Write a step of --model to a .txt, or draw it.", rich_help_panel="Output"),
    ] = None,
    inputs: o.InputsFrom = None,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Plan which device holds which expert, and say what to expect of it.

    Predicted are the time of a step, memory per device, bytes per link and the imbalance over noise levels.
    """
    with working(o.verbosity(quiet, verbose)):
        from moefx.passes.placement import Budget, RoutingTrace
        from moefx.passes.placement.presets import topology_from

        found, topology = RoutingTrace.open(trace), topology_from(on)
        dims = _dims(found, model, width, hidden, gated, seed)
        budget = Budget(
            memory_bytes=None if memory is None else parse_bytes(memory), copies=copies, restarts=restarts, seed=seed,
            seconds=float("inf") if seconds is None else seconds, spare=spare, windows=windows, imbalance=imbalance,
        )  # fmt: skip
        if strategy == "all":
            text = _compare(found, topology, dims, budget, as_json=json)
        else:
            text = _one(strategy, found, topology, dims, budget, save=save, plot=plot, as_json=json)
            if schedule is not None:
                _write_schedule(schedule, strategy, found, topology, budget, model=model, inputs=inputs, seed=seed)
    emit(text, out)


def parse_bytes(text: str) -> float:
    """Return ``6GB``, ``512MiB`` or a plain number as bytes.

    Raises:
        OptionError: it is none of them.
    """
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, flags=re.IGNORECASE)
    if read is None:
        raise OptionError(f"use {text!r} of memory", found="no size", do="write it as 6GB, 512MiB or 6000000000")
    base = 1024 if read[3] else 1000
    return float(read[1]) * float(base) ** " kmgt".index(read[2].lower() or " ")


def _dims(trace: RoutingTrace, model: str | None, width: int, hidden: int, gated: bool, seed: int) -> ModelDims:
    from moefx.passes.placement import ModelDims

    if model is not None:
        from moefx.cli.models import build

        return ModelDims.of(build(model, seed=seed)[0])
    if width < 1 or hidden < 1:
        do = "give --model, or --width and --hidden of a bfloat16 expert"
        raise OptionError("price a placement", found=f"width {width} and hidden width {hidden}", do=do)
    depth, weights = len(trace.layers), (3 if gated else 2) * width * hidden
    sizes: dict[str, Any] = {"expert_bytes": (2 * weights,) * depth, "row_bytes": (2 * width,) * depth}
    return ModelDims(trace.layers, trace.experts, row_flops=(2.0 * weights,) * depth, **sizes)


def _one(
    strategy: str, trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget, *,
    save: Path | None, plot: Path | None, as_json: bool,
) -> str:  # fmt: skip
    from moefx.passes.placement import place as plan
    from moefx.passes.placement.predict import predict

    placed = plan(trace, topology, dims, strategy, budget)
    seen = predict(placed, trace, topology, dims, budget)
    if save is not None:
        placed.save(save)
    if plot is not None:
        from moefx.cli.plots import draw_placement

        draw_placement(placed, trace, seen, plot)
    if as_json:
        head = {"format": "moefx.place", "schema_version": 1}
        data = head | {"placement": placed.model_dump(), "predicted": _data(seen)}
        return json_module.dumps(data, indent=1) + "\n"
    return rendered(_summary(placed, seen), _devices(placed, seen), _links(seen), _levels(trace, seen))


def _write_schedule(
    path: Path, strategy: str, trace: RoutingTrace, topology: Topology, budget: Budget, *,
    model: str | None, inputs: str | None, seed: int,
) -> None:  # fmt: skip
    """Write the graph of a step in the order in which it would run, or draw it before and after ordering."""
    if model is None:
        raise OptionError(f"write a schedule to {path}", found="no model", do="name it with --model")
    from moefx.cli.models import build
    from moefx.cli.plots import draw_schedules
    from moefx.inspect.scheduled import scheduled_text
    from moefx.parallel import preview
    from moefx.passes.placement import ModelDims
    from moefx.passes.placement import place as plan

    built, given = build(model, seed=seed, inputs=inputs)
    placed = plan(trace, topology, ModelDims.of(built), strategy, budget)
    best, one = (preview(built, placed, given, topology=topology, trace=trace, chunks=r) for r in (None, 1))
    if path.suffix == ".txt":
        path.write_text(scheduled_text(best.graph, best.timeline), encoding="utf-8")
        return
    parts = f"ordered, {best.chunks} parts of the tokens" if best.chunks > 1 else "ordered"
    draw_schedules({"as written": one.before, parts: best.timeline}, path)


def _data(seen: Prediction) -> dict[str, Any]:
    return {
        "step_s": seen.step_s.tolist(),
        "compute_s": seen.compute_s.tolist(),
        "exchange_s": seen.exchange_s.tolist(),
        "setup_s": seen.setup_s,
        "moving_s": seen.moving_s,
        "run_s": seen.run_s,
        "memory_bytes": seen.memory_bytes.tolist(),
        "link_bytes": seen.link_bytes,
        "max_over_mean": seen.imbalance.tolist(),
    }


def _summary(placed: Placement, seen: Prediction) -> str:
    copies = sum(len(layout.replicas) for layout in placed.layouts)
    mean, worst = seconds_text(float(seen.step_s.mean())), seconds_text(float(seen.step_s.max()))
    moving, least = seconds_text(seen.setup_s + seen.moving_s), placed.bound / max(placed.balanced, 1e-30)
    lines = [
        f"{placed.strategy}: {len(placed.layers)} layers on {len(placed.devices)} devices, "
        f"{len(placed.layouts)} layout(s), {copies} copies",
        f"experts take {placed.slowdown:.3f} times a perfect balance, at least {least:.3f}",
        f"a step takes {mean} on average, {worst} at worst",
        f"a run takes {seconds_text(seen.run_s)}, of which {moving} to move weights",
    ]
    if placed.goal is not None:
        lines.append(f"{placed.goal.name}: {placed.goal.value:.4g}, at least {placed.goal.bound:.4g}")
    return "\n".join(lines)


def _devices(placed: Placement, seen: Prediction) -> Any:
    rows = []
    for g, name in enumerate(placed.devices):
        primaries = sum(int(placed.counts(i)[g]) for i in range(len(placed.layers)))
        held = sum(len(placed.copies_of(i, g)) for i in range(len(placed.layers)))
        streamed = sum(int((~placed.resident(i)[placed.copies_of(i, g)]).sum()) for i in range(len(placed.layers)))
        rows.append([name, bytes_text(seen.memory_bytes[g]), str(primaries), str(held - primaries), str(streamed)])
    return table("devices", ["device", "memory", "experts", "copies", "streamed"], rows)


def _links(seen: Prediction) -> Any:
    busiest = sorted(seen.link_bytes.items(), key=lambda item: -item[1])
    rows = [[name, bytes_text(sent)] for name, sent in busiest[:_LINKS_SHOWN]]
    rest = len(busiest) - len(rows)
    return table("bytes per run" + (f" of the busiest links ({rest} more)" if rest else ""), ["link", "bytes"], rows)


def _levels(trace: RoutingTrace, seen: Prediction) -> Any:
    columns = (trace.sigmas, seen.imbalance, seen.compute_s, seen.exchange_s)
    rows = [
        [f"{sigma:.4g}", f"{ratio:.3f}", seconds_text(float(compute)), seconds_text(float(exchange))]
        for sigma, ratio, compute, exchange in zip(*columns, strict=True)
    ]
    return table("noise levels", ["sigma", "max/mean", "compute", "exchange"], rows)


def _compare(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget, *, as_json: bool) -> str:
    """Return one line per strategy; those that cannot plan say why."""
    from moefx.passes.placement import strategies
    from moefx.passes.placement.predict import predict

    found: list[dict[str, Any]] = []
    for strategy in strategies():
        try:
            placed = strategy(trace, topology, dims, budget)
        except MoefxError as error:
            found.append({"strategy": strategy.name, "refused": error.found})
            continue
        seen = predict(placed, trace, topology, dims, budget)
        found.append({
            "strategy": strategy.name, "slowdown": placed.slowdown, "step_s": float(seen.step_s.mean()),
            "run_s": seen.run_s, "memory_bytes": float(seen.memory_bytes.max()),
            "link_bytes": sum(seen.link_bytes.values()),
            "layouts": len(placed.layouts), "copies": sum(len(layout.replicas) for layout in placed.layouts),
        })  # fmt: skip
    if as_json:
        return json_module.dumps({"format": "moefx.place", "schema_version": 1, "strategies": found}, indent=1) + "\n"
    rows = [
        [f["strategy"], f["refused"]] if "refused" in f else [
            f["strategy"], f"{f['slowdown']:.3f}", seconds_text(f["step_s"]), seconds_text(f["run_s"]),
            bytes_text(f["memory_bytes"]), bytes_text(f["link_bytes"]), str(f["layouts"]), str(f["copies"]),
        ]
        for f in sorted(found, key=lambda f: f.get("run_s", float("inf")))
    ]  # fmt: skip
    columns = ["strategy", "slowdown", "step", "run", "memory", "bytes", "layouts", "copies"]
    return rendered(table(f"{len(topology)} devices, {len(trace.sigmas)} noise levels", columns, rows))

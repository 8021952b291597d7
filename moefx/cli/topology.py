"""``moefx topology``."""

from __future__ import annotations

import json as json_module
import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefx.cli import options as o
from moefx.cli.frame import emit, working
from moefx.cli.tables import bytes_text, rendered, table
from moefx.errors import OptionError

if TYPE_CHECKING:
    from moefx.passes.placement.measure import Measurement
    from moefx.passes.placement.topology import Topology

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="[TOPOLOGY]", help="processes:4, node:8, cluster:2x8, edge, or a JSON or YAML file.", show_default=False
    ),
]


def topology(
    name: Name = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the running job: every rank of torchrun calls it.")
    ] = False,
    json: o.Json = False,
    out: o.Out = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = 0,
) -> None:
    """Show the devices and links of a preset, of a file, or measured on the running job.

    With --json, what is written is a topology file for moefx place. To measure: torchrun --no-python --nproc-per-node 2
    moefx topology --measure --json.
    """
    with working(o.verbosity(quiet, verbose)):
        if measure == (name is not None):
            found = "a name and --measure" if measure else "neither a name nor --measure"
            raise OptionError("show a topology", found=found, do="give one of them")
        if name is None:
            measured, first = _measured()
            text = _text(measured.topology, measured, as_json=json)
        else:
            from moefx.passes.placement.presets import topology_from

            text, first = _text(topology_from(name), None, as_json=json), True
    if first:
        emit(text, out)


def _measured() -> tuple[Measurement, bool]:
    """Return what was measured, and whether this is the rank that writes."""
    import os

    import torch
    import torch.distributed as dist

    from moefx.passes.placement.measure import measure

    if "RANK" not in os.environ:
        return measure(), True  # refuses, and says how to start
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        return measure(), dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _text(found: Topology, measured: Measurement | None, *, as_json: bool) -> str:
    if as_json:
        return json_module.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    parts: list[Any] = []
    if measured is not None:
        apart = measured.beta_s_per_byte[measured.beta_s_per_byte > 0]
        rates = (
            sorted({f"{1e-9 / float(beta):.3g}" for beta in (apart.max(), apart.min())}) if apart.size else ["no end"]
        )
        others = ", ".join(f"{name} {error:.0%}" for name, error in measured.errors.items())
        parts.append(
            f"measured: {measured.model}, {measured.alpha_s * 1e6:.0f} µs + bytes at {' to '.join(rates)} GB/s; "
            f"{measured.matrices} exchanges; mean error of each model where it was not fitted: {others}"
        )
    parts.append(_devices(found))
    parts.append(_links(found))
    return rendered(*parts)


def _devices(found: Topology) -> Any:
    rows = []
    for g, name in enumerate(found.devices):
        flops, read = found.flops_per_s[g], found.memory_bytes_per_s[g]
        tiers = ", ".join(f"{tier} {1e-9 / link['beta_s_per_byte']:.3g} GB/s" for tier, link in found.tiers(g).items())
        rates = [
            f"{flops / 1e12:.3g} TFLOP/s" if math.isfinite(flops) else "-",
            f"{read / 1e9:.3g} GB/s" if math.isfinite(read) else "-",
        ]
        rows.append([name, bytes_text(found.memory_bytes[g]), *rates, f"{found.speeds[g]:.3g}", tiers or "-"])
    columns = ["device", "memory", "arithmetic", "memory rate", "speed", "streams from"]
    return table(f"{len(found)} devices", columns, rows)


def _links(found: Topology) -> Any:
    kinds: dict[tuple[str, float, float], list[str]] = {}
    for a, b, link in found.graph.edges(data=True):
        shared = link["resource"] if link["resource"] != f"{a}->{b}" else "-"
        kinds.setdefault((shared, link["alpha_s"], link["beta_s_per_byte"]), []).append(f"{a}->{b}")
    rows = [
        [
            names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
            f"{alpha * 1e6:.3g} µs",
            f"{1e-9 / beta:.3g} GB/s" if beta > 0 else "unlimited",
            shared,
        ]
        for (shared, alpha, beta), names in kinds.items()
    ]
    return table(f"{found.graph.number_of_edges()} links", ["link", "latency", "rate", "shared"], rows)

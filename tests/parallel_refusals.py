"""Scenarios of bad input: whichever rank has it, every rank gets a clear error, and nothing has changed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moefx.errors import MoefxError
from moefx.parallel import load_shards, parallelize
from moefx.passes.placement import Budget, ModelDims, Placement, Replica, RoutingTrace, Topology, place
from tests.parallel_training import HOMES, OTHERS
from tests.placement_worker import EXPERTS, Net, Numbers, placement

LAYERS = ("ffns.0", "ffns.1")


def trace() -> RoutingTrace:
    load = np.arange(1.0, 2 * EXPERTS + 1).reshape(1, 2, EXPERTS)
    return RoutingTrace(np.ones(1), LAYERS, (EXPERTS,) * 2, load)


def planned(**changes: Any) -> Placement:
    """Plan with parts of the problem replaced."""
    dims = ModelDims.of(Net(torch.float64))
    parts: dict[str, Any] = {"trace": trace(), "topology": Topology.processes(dist.get_world_size()), "dims": dims}
    return place(**(parts | {"strategy": "lpt"} | changes))


def islands() -> Topology:
    links = [{"from": "a", "to": "b", "alpha_s": 0.0, "beta_s_per_byte": 1e-9}]
    return Topology.from_dict({"devices": [{"name": "a"}, {"name": "b"}], "links": links})


def not_a_number() -> RoutingTrace:
    load = trace().load.copy()
    load[0, 1, 2] = np.nan
    return replace(trace(), load=load)


def copied(*devices: int) -> Placement:
    copies = tuple(Replica(layer=0, expert=1, device=g, share=0.2) for g in devices)
    return placement(*HOMES).model_copy(update={"replicas": copies})


def cases(folder: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return what is wrong on one rank, by name, and what the error says."""
    three = placement(*HOMES).model_copy(update={"devices": ("a", "b", "c")})
    other = replace(trace(), layers=("blocks.0", "blocks.1"))
    least = ModelDims.of(Net(torch.float64)).shared_bytes
    return {
        "no path": (lambda: planned(topology=islands()), "no path from b to a"),
        "memory": (lambda: planned(budget=Budget(memory_bytes=least + 10)), "a memory budget larger by"),
        "copies": (lambda: copied(0, 1, 0), "a copy of expert 1 of layer 0"),
        "copy nowhere": (lambda: copied(7), "which there is not"),
        "NaN": (lambda: planned(trace=not_a_number()), "load nan at sigma 1, ffns.1, expert 2"),
        "other model": (lambda: planned(trace=other), "a trace of 2 layers from blocks.0 on"),
        "devices": (lambda: planned(topology=Topology.processes(9)), "has 6 experts"),
        "world": (lambda: three, "a placement on 3 devices, 2 processes"),
        "file": (lambda: Placement.open(folder / "no plan.json"), "no plan.json"),
    }


def bad_input_is_an_error_on_every_rank(folder: Path) -> Numbers:
    """Each case on the last rank only, which names what it found; the others say which rank refused, and what."""
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), {}
    for name, (make, says) in cases(folder).items():
        model, given = Net(torch.float64), make if rank == ranks - 1 else placement(*HOMES)
        found[name] = refused(partial(parallelize, model, None, given), says)
        found[name] += float(rank != ranks - 1 and f"rank {ranks - 1} refused" not in last_error[0])
        found[name] += float(unchanged(model))
    model = Net(torch.float64)
    found["plans"] = refused(
        lambda: parallelize(model, None, placement(*(OTHERS if rank else HOMES))), "rank 1 differs from rank 0"
    )
    found["plans"] += unchanged(model)
    found["shards"] = refused(lambda: load_shards(model, folder / f"nothing {rank}"), "moefx_shards.json")
    found["shards"] += unchanged(model)
    path = folder / "plan.json"
    if rank == 0:
        placement(*HOMES).save(path)
    dist.barrier()
    found["from a file"] = float(parallelize(model, None, path).ffns[0].experts.homes == ())
    return dict(found)


last_error = [""]


def refused(call: Callable[[], object], says: str) -> float:
    try:
        call()
    except MoefxError as error:
        last_error[0] = str(error)
        return float(says not in str(error))
    return 1.0


def unchanged(model: Net) -> float:
    """Return 0 if the model is still whole and has its weights."""
    wanted = Net(torch.float64).state_dict()
    same = all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    return float(not same or any(type(ffn.experts).__name__ != "Experts" for ffn in model.ffns))

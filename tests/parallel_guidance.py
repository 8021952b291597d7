"""Scenarios of guidance branches on different ranks, on four."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from examples.dit import DiT
from moefx import zoo
from moefx.errors import MoefxError
from moefx.parallel import parallelize, split_guidance
from moefx.passes.placement import ModelDims, Topology, TraceCollector, place, routed_layers
from tests.parallel_denoisers import dit_inputs, flux_inputs, routed
from tests.placement_worker import Numbers, error


def branches_on_different_ranks() -> Numbers:
    """DiT over data x cfg x expert and FLUX over cfg x expert: all outputs, from half the tokens per rank."""
    four = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("data", "cfg", "expert"))
    two = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "expert"))
    found: Numbers = {}
    for name, mesh in (("DiT", four), ("FLUX", two)):
        make, inputs = (dit, dit_inputs) if name == "DiT" else (flux, flux_inputs)
        model = make()
        both = {key: doubled(value) if key not in ("img_ids", "txt_ids") else value for key, value in inputs(0).items()}
        with torch.no_grad(), TraceCollector(model) as collector, collector.at(0.5):
            model(**both)
        plan = place(collector.trace(), Topology.processes(2), ModelDims.of(model), "minimax_time")
        whole, seen = copy.deepcopy(model), []
        parallelize(model, mesh, plan)
        split = split_guidance(model, mesh, whole=("img_ids", "txt_ids"))
        hook = next(iter(routed_layers(model).values())).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].shape[0])
        )
        with torch.no_grad():
            wanted, out = whole(**both), model(**both)
            found[name] = max(error(a, b) for a, b in zip(leaves(out), leaves(wanted), strict=True))
            one = {key: sliced(value) if key not in ("img_ids", "txt_ids") else value for key, value in both.items()}
            found[f"{name}, odd"] = max(
                error(a, b) for a, b in zip(leaves(model(**one)), leaves(whole(**one)), strict=True)
            )
            split.remove()
            found[f"{name}, undone"] = error(leaves(model(**both))[0], leaves(wanted)[0])
        hook.remove()
        batch = leaves(wanted)[0].shape[0]
        found[f"{name}, tokens"] = float(seen != [batch // 2, 1, batch])
    return found


def gradients_are_refused() -> Numbers:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "expert"))
    model = dit()
    split_guidance(model, mesh)
    missed = 2
    try:
        model(**dit_inputs(0))
    except MoefxError as refused:
        missed -= "gradients are on" in str(refused)
    try:
        split_guidance(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    except MoefxError as refused:
        missed -= "'cfg'" in str(refused)
    return {"missed": float(missed)}


def dit() -> torch.nn.Module:
    torch.manual_seed(0)
    return routed(DiT(depth=2, width=16, label_dropout=0.0).double(), dit_inputs(0)).eval()


def flux() -> torch.nn.Module:
    return routed(zoo.tiny("FluxTransformer2DModel").double(), flux_inputs(0)).eval()


def doubled(value: object) -> object:
    """Return both branches in one batch: the same sample under another condition."""
    if not isinstance(value, torch.Tensor):
        return value
    other = value + 1 if value.is_floating_point() else 3 - value
    return torch.cat([value, other])


def sliced(value: object) -> object:
    return value[:1] if isinstance(value, torch.Tensor) else value


def leaves(output: object) -> list[torch.Tensor]:
    return list(output) if isinstance(output, tuple) else [output]  # type: ignore[list-item]

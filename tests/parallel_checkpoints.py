"""Scenarios of checkpoints and of a rank that dies, in several jobs one after another."""

import json
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moefx.errors import MoefxError
from moefx.parallel import (
    average_expert_gradients,
    average_gradients,
    expert_parameters,
    gather_state_dict,
    load_shards,
    parallelize,
    save_shards,
)
from moefx.passes.placement import Placement
from tests.parallel_training import HALF, HOMES, STEPS, distance, reference, train
from tests.placement_worker import EXPERTS, Net, Numbers, error, placement, shards


def spread(ranks: int) -> Placement:
    return placement(*(tuple((e + layer) % ranks for e in range(EXPERTS)) for layer in range(2)))


def save_half_way(folder: Path) -> Numbers:
    model = parallelize(Net(torch.float64), None, spread(dist.get_world_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = train(model, optimizer, range(HALF), lambda _: None)
    save_shards(model, folder / "checkpoint", optimizer, extra={"step": 1})
    save_shards(model, folder / "checkpoint", optimizer, extra={"step": HALF})  # replaces the first
    return {"losses": distance(losses, reference()[0][:HALF])}


def resume(folder: Path) -> Numbers:
    model = parallelize(Net(torch.float64), None, spread(dist.get_world_size()))
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    extra = load_shards(model, folder / "checkpoint", optimizer)
    losses = train(model, optimizer, range(extra["step"], STEPS), lambda _: None)
    wanted, weights = reference()
    found = gather_state_dict(model)
    return {
        "losses": distance(losses, wanted[HALF:]),
        "weights": max(error(found[name], weights[name]) for name in weights if weights[name].is_floating_point()),
    }


def divide(model: nn.Module) -> nn.Module:
    """Let FSDP divide what is no expert over all ranks."""
    everyone = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=everyone, ignored_params=set(expert_parameters(model).values()))
    return model


def save_divided(folder: Path) -> Numbers:
    """On four ranks as data x expert, under FSDP."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    plan = placement(*HOMES).model_copy(update={"devices": ("a", "b")})
    model = divide(parallelize(Net(torch.float64), mesh, plan))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = train(model, optimizer, range(HALF), lambda _: None, lambda _: average_expert_gradients(model))
    save_shards(model, folder / "divided", optimizer, extra={"step": HALF})
    wanted, _ = reference()
    whole = gather_state_dict(model)
    assert [tuple(t.shape) for t in whole.values()] == [
        tuple(t.shape) for t in Net(torch.float64).state_dict().values()
    ]
    return {"losses": distance(losses, wanted[:HALF])}


def resume_divided(folder: Path) -> Numbers:
    """On another number of ranks, divided by FSDP and not."""
    found: Numbers = {}
    for name, wrap in (("divided", divide), ("plain", lambda model: model)):
        model = wrap(parallelize(Net(torch.float64), None, spread(dist.get_world_size())))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = load_shards(model, folder / "divided", optimizer)["step"]
        average = average_expert_gradients if name == "divided" else average_gradients
        losses = train(model, optimizer, range(step, STEPS), lambda _: None, average)
        wanted, weights = reference()
        whole = gather_state_dict(model)
        found[name] = distance(losses, wanted[HALF:])
        worst = max(error(whole[key], weights[key]) for key in weights if weights[key].is_floating_point())
        found[f"{name}, weights"] = worst
    return found


def damaged_checkpoint(folder: Path) -> Numbers:
    """A missing and a corrupt shard are refused on all ranks, and nothing is half loaded."""
    model, missed = parallelize(Net(torch.float64), None, spread(dist.get_world_size())), 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, says in (("missing", "rank-00001.safetensors is missing"), ("corrupt", "another size or hash")):
        try:
            load_shards(model, folder / name)
            missed += 1
        except MoefxError as refused:
            missed += says not in str(refused)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return {"missed": float(missed)}


def lose_a_rank(folder: Path) -> Numbers:
    """The last rank is killed between two steps; what the others see is written down."""
    model, rank = parallelize(Net(torch.float64), None, spread(dist.get_world_size())), dist.get_rank()
    x = shards([5] * dist.get_world_size(), torch.float64)[rank]
    model(x).sum().backward()
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        model(x).sum().backward()
    except MoefxError as lost:
        report = {"seconds": time.monotonic() - begin, "error": f"{type(lost).__name__}: {lost}"}
        (folder / f"lost-{rank}.json").write_text(json.dumps(report))
    os._exit(0)  # the process group is broken: leave without saying goodbye

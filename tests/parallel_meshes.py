"""Scenarios of four ranks: experts over some of them, the batch over all."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moefx.errors import MoefxError
from moefx.parallel import (
    average_expert_gradients,
    expert_parameters,
    gather_state_dict,
    parallelize,
)
from tests.parallel_training import HOMES, STEPS, distance, reference, train
from tests.placement_worker import Net, Numbers, error, placement


def under_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> Numbers:
    """Train with experts over two ranks, twice, and something else that averages what is replicated."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model = parallelize(Net(torch.float64), mesh, placement(*HOMES).model_copy(update={"devices": ("a", "b")}))
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
    losses = train(wrapped, optimizer, range(STEPS), lambda _: None, lambda _: average_expert_gradients(model))
    return {"losses": distance(losses, reference()[0])}


def under_ddp() -> Numbers:
    return under_wrapper(DistributedDataParallel)


def under_fsdp() -> Numbers:
    """What is no expert is divided over all four ranks."""

    def wrap(model: nn.Module) -> nn.Module:
        everyone = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=everyone, ignored_params=set(expert_parameters(model).values()))
        return model

    return under_wrapper(wrap)


def experts_times_data() -> Numbers:
    """Experts divided over two ranks, twice: as one process on the whole batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    plan = placement(*HOMES).model_copy(update={"devices": ("a", "b")})
    model = parallelize(Net(torch.float64), mesh, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = train(model, optimizer, range(STEPS), lambda _: None)
    wanted, weights = reference()
    found = gather_state_dict(model)
    return {
        "losses": distance(losses, wanted),
        "weights": max(error(found[name], weights[name]) for name in weights if weights[name].is_floating_point()),
    }


def a_mesh_refuses_as_one() -> Numbers:
    """One rank of four has another model: all four refuse."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    model, refused = Net(torch.float64), 0
    if dist.get_rank() == 3:
        model.embed.weight.data[0, 0] += 1
    try:
        parallelize(model, mesh, placement(*HOMES).model_copy(update={"devices": ("a", "b")}))
    except MoefxError:
        refused = 1
    return {"missed": float(1 - refused)}

"""Gradients and state of a parallel model as one process would have them. Each function is a collective.

Legend: E experts, G ranks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.distributed.tensor import DTensor, distribute_tensor

from moefx.parallel.divided import DividedExperts
from moefx.parallel.parallelize import DATA_GROUP, expert_parameters, parallel_layers


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over the ranks as one process would have them.

    Call it on every rank after ``backward``, unless DistributedDataParallel or FSDP2 wraps the model: then call
    :func:`average_expert_gradients`. A parameter without a gradient on some ranks counts as zero there; without one
    anywhere it keeps none.
    """
    group = _group(next(iter(parallel_layers(model).values())))
    experts = {id(p) for p in expert_parameters(model).values()}
    replicated = [p for p in model.parameters() if p.requires_grad and id(p) not in experts]
    _average(replicated, group)
    data = _data_group(model)
    if data is not None:
        _average(replicated, data)
    average_expert_gradients(model)


def average_expert_gradients(model: nn.Module) -> None:
    """Average the experts' gradients over the ranks that hold the same experts; without a data dimension do nothing.

    Over the ranks of one set of experts they are averages already.
    """
    data = _data_group(model)
    if data is not None:
        _average([p for p in expert_parameters(model).values() if p.requires_grad], data)


def _average(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    if not parameters:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    dist.all_reduce(present, group=group)
    for parameter, ranks in zip(parameters, present.tolist(), strict=True):
        if not ranks:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))


def _data_group(model: nn.Module) -> dist.ProcessGroup | None:
    name = model.__dict__.get(DATA_GROUP)
    found: dist.ProcessGroup | None = None if name is None else _resolve_process_group(cast(Any, name))
    return found


def gather_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return the state dict of the model with all experts, on every rank, in the names and order of the whole model.

    Loading it into a parallel model on any number of ranks takes each rank's part.
    """
    state = {name: whole(t) if isinstance(t, Tensor) else t for name, t in model.state_dict().items()}
    layers = parallel_layers(model)
    for prefix, layer in layers.items():
        for name in layer.stacked_names:
            key = f"{prefix}.{name}" if prefix else name
            state[key] = gather_experts(layer, layer.get_parameter(name).detach())
    return state


def gather_experts(layer: DividedExperts, local: Tensor) -> Tensor:
    """Return ``[E, ...]`` on every rank from each rank's ``[E_local, ...]``, a parameter or its gradient."""
    layer.need_weights("gather experts")
    group = _group(layer)
    full = local.new_empty((layer.num_experts, *local.shape[1:]))
    for rank, home in enumerate(layer.homes):
        if not home:
            continue
        part = local.contiguous() if rank == layer.rank else local.new_empty((len(home), *local.shape[1:]))
        dist.broadcast(part, group=group, group_src=rank)
        full[torch.tensor(home, device=full.device)] = part
    return full


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP divides as a whole, a collective then; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, divided as ``like`` is, without talking to other ranks."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _group(layer: DividedExperts) -> dist.ProcessGroup:
    found: dist.ProcessGroup = _resolve_process_group(cast(Any, layer.group))
    return found

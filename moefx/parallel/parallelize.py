"""Carry out a placement on the running job: each process keeps the experts that live on it.

Legend: L routed layers, G ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from moefx.errors import InputError, MoefxError, OptionError, PlanError
from moefx.parallel.agree import agree, structure_digest, text_digest, weights_digest
from moefx.parallel.divided import DividedExperts
from moefx.parallel.experts import KINDS
from moefx.parallel.floating import check_part, install
from moefx.parallel.overlap import prepare
from moefx.parallel.roster import Roster
from moefx.parallel.tiers import Tiers, install_tiers, plan_tiers
from moefx.passes.placement import ModelDims, Placement, routed_layers
from moefx.passes.placement.stacks import stack_of

Model = TypeVar("Model", bound=nn.Module)
EXPERT_DIM = "expert"
# Names under which a parallel model keeps its placement and the ranks that hold the same experts; no part of its state.
PLACEMENT, DATA_GROUP = "_moefx_placement", "_moefx_data_group"
_NO_DIGEST = bytes(32)


def parallelize(
    model: Model,
    mesh: DeviceMesh | None,
    placement: Placement | str | os.PathLike[str] | Callable[[], Placement],
    *,
    chunks: int = 1,
    once: bool = False,
    overlap_shared: bool = False,
    floating: Sequence[str] = (),
    budget: int | str | None = None,
    staging: int = 8,
    folder: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> Model:
    """Keep on each process only its experts, in place, and return ``model``.

    Call it on every rank, with the same whole model and the same placement. Each rank then runs its own share of the
    batch; tokens travel to their experts and back. Everything but the experts stays replicated: average its gradients
    with :func:`average_gradients`, or wrap the model in ``DistributedDataParallel``, which leaves the experts alone, or
    in FSDP2 with ``ignored_params=set(expert_parameters(model).values())``; then call
    :func:`average_expert_gradients`. All ranks must make the same calls, backward passes included: each holds a part of
    every layer.

    A placement with windows starts with its first layout; see :func:`switch`.

    Args:
        model: a model with routed FFNs, from :func:`moefx.transform`.
        mesh: rank i is device i of the placement; None for all processes of the job. A mesh of several dimensions, one
            of them named ``"expert"``, divides the experts along that one and repeats them along the others, such as
            ``"data"`` and ``"cfg"``; see :func:`split_guidance`.
        placement: where the experts live: a plan, the file of one, or a function that makes one. What goes wrong while
            one rank reads or makes it is an error on all.
        chunks: parts of the tokens, of which one travels while another is computed; ``best_degree`` of
            :mod:`moefx.passes.schedule` finds how many.
        once: send a token to each rank at most once, however many of its experts live there.
        overlap_shared: compute shared experts while rows travel. Do not divide these modules by FSDP on their own.
        floating: names of parts of the model that work token by token and hold several routed FFNs: tokens stay where
            their experts are from one of these to the next, and go home at the end of the part.
        budget: bytes, or text such as ``"6GB"``, for all weights on this rank's device; experts of its share that do
            not fit are streamed, for inference. All ranks pass one or none does; a placement with tiers needs none.
        staging: how many halves of experts have room to be loaded ahead.
        folder: where the files of streamed experts go; see :func:`moefx.offload`.
        verify: compare the weights of all ranks first, which reads each weight once.

    Raises:
        InputError: ``torch.distributed`` is not running, or an argument has the wrong type.
        NothingMatched: the model has no routed FFN.
        PlanError: the placement is of another model or another number of processes, the model is parallel already, a
            budget is too small (by how much, and which would do), or ranks were given different models or placements.
            One rank's error is raised on all; nothing was changed.
    """
    asked = f"parallelize {type(model).__name__}"
    group, data = find_groups(mesh, asked)
    how = _How(chunks, once, overlap_shared, tuple(floating), budget, staging, folder)
    plan, tiers = _agreed(model, placement, how, [group, data], asked, verify=verify)
    # A group of its own: collectives of data parallelism must not slip in between those of a layer.
    own = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    rank, layout = dist.get_rank(own), plan.layouts[0]
    for i, layer in enumerate(routed_layers(model).values()):
        stack = stack_of(layer)
        kind: Any = KINDS[type(stack.experts)]
        shared = prepare(layer) if overlap_shared and kind.overlaps else None
        options = {"chunks": chunks, "once": once, "shared": shared}
        stack.owner.experts = kind(stack.experts, Roster.of(layout, i), rank, own.group_name, **options)
    for name in floating:
        install(model, name, asked)
    if tiers is not None:
        install_tiers(model, list(parallel_layers(model).values()), tiers)
    model.__dict__[PLACEMENT] = plan
    model.__dict__[DATA_GROUP] = None if data is None else data.group_name
    _leave_to_us(model)
    return model


class _How(NamedTuple):
    """The options of :func:`parallelize` that are no objects of torch."""

    chunks: int
    once: bool
    overlap_shared: bool
    floating: tuple[str, ...]
    budget: int | str | None
    staging: int
    folder: str | os.PathLike[str] | None

    @property
    def agreed(self) -> str:
        """What must be the same on all ranks; budgets may differ."""
        return repr((self.chunks, self.once, self.overlap_shared, self.floating, self.budget is None))


def _agreed(
    model: nn.Module,
    placement: Any,
    how: _How,
    groups: list[dist.ProcessGroup | None],
    asked: str,
    *,
    verify: bool,
) -> tuple[Placement, Tiers | None]:
    """Return the plan and what stays on this rank, if all ranks can do it, and the same; nothing is changed."""
    problem: MoefxError | None = None
    made: Any = None
    tiers: Tiers | None = None
    facts = {"the placements": _NO_DIGEST, "the models' parameters": _NO_DIGEST, "the models' weights": _NO_DIGEST}
    group = groups[0]
    assert group is not None
    try:
        made = _made(placement)
        _check(model, group, made, asked)
        _check_options(how.chunks, how.once, how.overlap_shared, asked)
        for name in how.floating:
            check_part(model, name, asked)
        sizes: dict[str, Any] = {"budget": how.budget, "staging": how.staging, "folder": how.folder}
        tiers = plan_tiers(model, made, dist.get_rank(group), asked, **sizes)
    except MoefxError as error:
        problem = error
    else:
        weights = weights_digest(model) if verify else _NO_DIGEST
        plan = text_digest(made.digest.hex() + how.agreed)
        facts = dict(zip(facts, (plan, structure_digest(model), weights), strict=True))
    agree_everywhere(asked, facts, problem, groups)
    assert isinstance(made, Placement)
    return made, tiers


def _made(placement: Any) -> Any:
    """Read or make the plan."""
    if isinstance(placement, str | os.PathLike):
        return Placement.open(Path(placement))
    return placement() if callable(placement) else placement


def agree_everywhere(
    asked: str, facts: dict[str, bytes], problem: MoefxError | None, groups: list[dist.ProcessGroup | None]
) -> None:
    """Agree within each set of experts, then across the sets, which learn of what another set refused."""
    for group in groups:
        if group is None:
            continue
        try:
            agree(asked, facts, problem, _device_type(group), group)
        except MoefxError as error:
            problem = error
    if problem is not None:
        raise problem


def parallel_layers(model: nn.Module) -> dict[str, DividedExperts]:
    """Return the parallel experts of ``model`` by dotted name.

    Raises:
        PlanError: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DividedExperts)}
    if not layers:
        raise PlanError(
            f"use {type(model).__name__} as a parallel model", found="no parallel experts", do="parallelize it first"
        )
    return layers


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that differ from rank to rank, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: layer.get_parameter(name)
        for prefix, layer in parallel_layers(model).items()
        for name in layer.stacked_names
    }


def find_groups(mesh: DeviceMesh | None, asked: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """Return the ranks among which the experts are divided, and those that hold the same experts as this one."""
    if not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            asked,
            found="torch.distributed is not running",
            do="start with torchrun and call torch.distributed.init_process_group",
        )
    if mesh is None:
        world = dist.group.WORLD
        assert world is not None
        return world, None
    names = getattr(mesh, "mesh_dim_names", None) or ()
    flat = isinstance(mesh, DeviceMesh) and mesh.ndim == 1
    if not flat and not (isinstance(mesh, DeviceMesh) and EXPERT_DIM in names):
        raise InputError(
            asked,
            found=f"a {type(mesh).__name__} of {getattr(mesh, 'ndim', 'no')} dimensions named {list(names)}",
            do="pass a one-dimensional DeviceMesh, one with names of which one is 'expert', or None",
        )
    along = mesh if flat else mesh[EXPERT_DIM]
    rest = tuple(name for name in names if name != EXPERT_DIM)
    other = None if flat else (mesh[rest[0]] if len(rest) == 1 else mesh[rest]._flatten()).get_group()
    ranks = along.mesh.tolist()
    if ranks != sorted(ranks) or dist.get_rank() not in ranks:
        raise InputError(
            asked, found=f"rank {dist.get_rank()} and a mesh over {ranks}", do="list this rank; keep ascending order"
        )
    return along.get_group(), other


def _check(model: object, group: dist.ProcessGroup, placement: object, asked: str) -> None:
    if not isinstance(model, nn.Module) or not isinstance(placement, Placement):
        found = f"a {type(model).__name__} and a {type(placement).__name__}"
        raise InputError(asked, found=found, do="pass a torch.nn.Module and a Placement")
    layers = routed_layers(model)
    stacks = {name: stack_of(layer).experts for name, layer in layers.items()}
    if any(isinstance(experts, DividedExperts) for experts in stacks.values()):
        raise PlanError(asked, found="it is parallel already", do="build the model anew, or use it as it is")
    other = {name: type(experts).__name__ for name, experts in stacks.items() if type(experts) not in KINDS}
    if other:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise PlanError(
            asked,
            found=", ".join(f"{name}: experts of class {kind}" for name, kind in other.items()),
            do=f"leave these sites dense (skip=...), or use one of {known}; offloaded experts need moefx.onload first",
        )
    if len({id(experts) for experts in stacks.values()}) < len(stacks):
        raise PlanError(asked, found="two layers share their experts", do="give each its own")
    if len(placement.devices) != dist.get_world_size(group):
        raise PlanError(
            asked,
            found=f"a placement on {len(placement.devices)} devices, {dist.get_world_size(group)} processes",
            do=f"start {len(placement.devices)} processes, or plan for {dist.get_world_size(group)} devices",
        )
    placement.check(ModelDims.of(model))


def _check_options(chunks: object, once: bool, overlap_shared: bool, asked: str) -> None:
    if not isinstance(chunks, int) or chunks < 1 or (once and (chunks > 1 or overlap_shared)):
        found = f"chunks = {chunks!r}, once = {once}, overlap_shared = {overlap_shared}"
        raise OptionError(asked, found=found, do="use chunks >= 1, and once without chunks and overlap")


def _device_type(group: dist.ProcessGroup) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _leave_to_us(model: nn.Module) -> None:
    """Tell DistributedDataParallel that the experts differ from rank to rank; torch has no public name for this."""
    known = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    ignored = known + [name for name in expert_parameters(model) if name not in known]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]

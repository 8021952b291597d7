"""``moefx.offload``: run a model whose experts do not all fit, with the same result; ``moefx.onload`` undoes it."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from moefx.errors import InputError, NothingMatched, OptionError, PlanError
from moefx.model.save import parse_size
from moefx.offloading.experts import OffloadedExperts
from moefx.offloading.layout import Layout, stacked
from moefx.offloading.pins import Pins, choose_pins, room_for_pins
from moefx.offloading.store import FileStore, HostStore, Store
from moefx.offloading.stream import LeastRecentlyUsed, OffloadStats, Piece, Scheduled, Stream
from moefx.passes.placement import RoutingTrace, routed_layers
from moefx.passes.placement.stacks import stack_of
from moefx.routing.experts import Experts

Model = TypeVar("Model", bound=nn.Module)
_POLICIES = ("schedule", "lru")


def offload(
    model: Model,
    budget: int | str,
    *,
    trace: RoutingTrace | None = None,
    folder: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    staging: int = 8,
    policy: str = "schedule",
) -> Model:
    """Keep at most ``budget`` bytes of weights on the device, in place, and return ``model``; for inference.

    What is no routed expert stays, and so do as many experts as fit; see :func:`choose_pins`. The others lie in
    page-locked host memory (accelerators) or in memory-mapped safetensors files (CPU, or if a folder is given), and are
    loaded while the layers before them compute. Results are those of the resident model to the bit.

    The state dict is complete at all times, so the model can be saved. Experts that are whole modules, linear
    maps or low-rank deltas stay resident.

    Args:
        model: a model with routed FFNs.
        budget: bytes, or text such as ``"6GB"``, for all weights on the device, staging slots included.
        trace: what the routers did, from :class:`TraceCollector`: experts that are used at more noise levels stay.
        folder: where to put the files, on a disk rather than in a file system that is itself memory; a subfolder is
            made there and removed with the model, or after :func:`onload`.
        device: where to compute; by default where the experts are. The rest of the model is moved there.
        staging: how many halves of experts (first or second projection) have room to be loaded ahead.
        policy: ``"schedule"``, or ``"lru"`` for a least-recently-used cache of the same size, to compare with.

    Raises:
        NothingMatched: there are no routed experts to offload.
        PlanError: the budget is too small (the message says which would do), the model is offloaded already, two layers
            share their experts, or the trace is of another model.
        InputError: the folder cannot be written, or there is no such device. Nothing was changed.
    """
    asked = f"offload {type(model).__name__} to {budget!r}"
    layers = _candidates(model, asked)
    where = _device(device, layers, asked)
    _check(layers, trace, staging, policy, asked)
    layouts = [Layout.of(experts) for experts in layers.values()]
    pins, slots = _divide(model, layers, layouts, _limit(budget, asked), trace, staging, asked)
    if policy == "lru":  # the same bytes, as slots
        held = sum(len(kept) * layout.nbytes for kept, layout in zip(pins, layouts, strict=True))
        slots += held // max(layout.largest for layout in layouts)
        pins = ((),) * len(pins)
    made = stream_experts(list(layers.values()), pins, slots, where, folder, policy)
    _install(model, layers, made, where)
    return model


def stream_experts(
    layers: list[Experts],
    pins: Pins,
    slots: int,
    device: torch.device,
    folder: str | os.PathLike[str] | None = None,
    policy: str = "schedule",
) -> list[OffloadedExperts]:
    """Return what can stand in place of the experts of successive layers, with one store and one stream for all."""
    layouts = [Layout.of(experts) for experts in layers]
    store = _store([dict(stacked(experts)) for experts in layers], device, folder)
    stream = _stream(policy, store, layouts, pins, layers, slots, device)
    return [OffloadedExperts(e, layouts[i], i, pins[i], store, stream, device) for i, e in enumerate(layers)]


def onload(model: Model) -> Model:
    """Bring all experts back onto the device, to the bit as they were, and return ``model``.

    Raises:
        PlanError: the model is not offloaded.
    """
    owners = _offloaded(model, f"bring back the experts of {type(model).__name__}")
    for experts in owners.values():
        restored = experts.restore()
        for module in model.modules():
            for name, child in module._modules.items():
                if child is experts:
                    module._modules[name] = restored
    next(iter(owners.values())).stream.close()
    return model


def offload_stats(model: nn.Module) -> OffloadStats:
    """Return the counts of an offloaded model; they go on counting.

    Raises:
        PlanError: the model is not offloaded.
    """
    return next(iter(_offloaded(model, "read offloading statistics").values())).stream.stats


def _candidates(model: object, asked: str) -> dict[str, Experts]:
    if not isinstance(model, nn.Module):
        raise InputError(asked, found=f"a {type(model).__name__}", do="pass a torch.nn.Module")
    if any(isinstance(module, OffloadedExperts) for module in model.modules()):
        raise PlanError(asked, found="it is offloaded already", do="call moefx.onload(model) first")
    stacks = {name: stack_of(layer).experts for name, layer in routed_layers(model).items()}
    layers = {name: experts for name, experts in stacks.items() if type(experts) is Experts}
    if not layers:
        raise NothingMatched(asked, found="no stacked feed-forward experts", do="offload a model with routed FFNs")
    if len({id(experts) for experts in layers.values()}) < len(layers):
        raise PlanError(asked, found="two layers share their experts", do="give each its own")
    return layers


def _check(layers: dict[str, Experts], trace: RoutingTrace | None, staging: int, policy: str, asked: str) -> None:
    if policy not in _POLICIES:
        raise OptionError(asked, found=f"policy = {policy!r}", do=f"use one of {', '.join(_POLICIES)}")
    if not isinstance(staging, int) or staging < 2:
        raise OptionError(asked, found=f"staging = {staging!r}", do="use at least 2: one to compute, one to load")
    if any(p.is_meta for experts in layers.values() for p in experts.parameters()):
        raise InputError(asked, found="experts on meta, without values", do="load the weights first")
    shape = (tuple(layers), tuple(experts.num_experts for experts in layers.values()))
    if trace is not None and (trace.layers, trace.experts) != shape:
        raise PlanError(
            asked,
            found=f"a trace of {len(trace.layers)} layers from {trace.layers[0]} on, a model of {len(layers)} from "
            f"{next(iter(layers))} on, or other numbers of experts",
            do="collect a trace of this model",
        )


def _divide(
    model: nn.Module,
    layers: dict[str, Experts],
    layouts: list[Layout],
    limit: int,
    trace: RoutingTrace | None,
    staging: int,
    asked: str,
) -> tuple[Pins, int]:
    """Return the experts that stay and the number of staging slots; everything and one slot if all of it fits."""
    counts, sizes = [e.num_experts for e in layers.values()], [layout.nbytes for layout in layouts]
    shared = _bytes(model) - sum(p.nbytes for experts in layers.values() for p in stacked(experts).values())
    if shared + sum(count * size for count, size in zip(counts, sizes, strict=True)) <= limit:
        return tuple(tuple(range(count)) for count in counts), 1
    slot = max(layout.largest for layout in layouts)
    return choose_pins(counts, sizes, room_for_pins(asked, limit, shared, slot, staging), trace), staging


def _limit(budget: int | str, asked: str) -> int:
    try:
        return parse_size(budget)
    except OptionError as error:
        raise OptionError(asked, found="no size", do="pass bytes, or text like '6GB' or '900MiB'") from error


def _device(device: str | torch.device | None, layers: dict[str, Experts], asked: str) -> torch.device:
    found = next(iter(layers.values())).w_in.device
    try:
        wanted = found if device is None else torch.device(device)
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(asked, found=f"device {device!r}: {error}", do="pass a device of this machine") from error


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _store(
    tensors: list[dict[str, nn.Parameter]], device: torch.device, folder: str | os.PathLike[str] | None
) -> Store:
    if device.type != "cpu" and folder is None:
        return HostStore(tensors, device)
    if folder is not None and not Path(folder).is_dir():
        raise InputError(f"offload to {str(folder)!r}", found="no such folder", do="make it first")
    return FileStore(tensors, None if folder is None else Path(folder))


def _stream(
    policy: str,
    store: Store,
    layouts: list[Layout],
    pins: Pins,
    layers: list[Experts],
    staging: int,
    device: torch.device,
) -> Stream:
    if policy == "lru":
        return LeastRecentlyUsed(store, layouts, staging, device)
    streamed = [
        [Piece(i, half, e) for half in (0, 1) for e in range(layer.num_experts) if e not in set(pins[i])]
        for i, layer in enumerate(layers)
    ]
    return Scheduled(store, layouts, streamed, staging, device)


def _install(model: nn.Module, layers: dict[str, Experts], made: list[OffloadedExperts], device: torch.device) -> None:
    """Put the new modules in place of the old, and only then let the old weights go."""
    for (name, experts), new in zip(layers.items(), made, strict=True):
        stack_of(model.get_submodule(name)).owner._modules["experts"] = new
        for parameter in stacked(experts).values():
            parameter.data = parameter.data.new_empty(0)
    model.to(device)
    weakref.finalize(model, made[0].stream.close)


def _offloaded(model: object, asked: str) -> dict[str, OffloadedExperts]:
    if not isinstance(model, nn.Module):
        raise InputError(asked, found=f"a {type(model).__name__}", do="pass a torch.nn.Module")
    found = {name: module for name, module in model.named_modules() if isinstance(module, OffloadedExperts)}
    if not found:
        raise PlanError(asked, found="no offloaded experts", do="call moefx.offload(model, budget=…) first")
    return found

"""Whole denoisers on several ranks against one process."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.graph.inputs import synthesise
from moefx.parallel import average_gradients, parallelize, switch
from moefx.passes.placement import (
    Budget,
    ModelDims,
    Placement,
    RoutingTrace,
    Topology,
    TraceCollector,
    place,
    strategies,
)
from tests.parallel_kinds import gradient_error
from tests.placement_worker import EXPERTS, TOP_K, Numbers, error

Inputs = Callable[[int], dict[str, Any]]


def dit() -> Numbers:
    """DiT: every strategy, loads that differ from rank to rank, changes of window."""
    torch.manual_seed(0)
    model = routed(DiT(depth=2, width=16, label_dropout=0.0).double(), dit_inputs(0))
    return every_strategy("DiT", model, dit_inputs)


def flux() -> Numbers:
    """FLUX, whose blocks are of two kinds."""
    return every_strategy("FLUX", routed(zoo.tiny("FluxTransformer2DModel").double(), flux_inputs(0)), flux_inputs)


def every_strategy(name: str, model: nn.Module, inputs: Inputs) -> Numbers:
    """Return the worst error of output, loss and all gradients, by strategy and dtype."""
    trace, found = trace_of(model, inputs), {}
    plans = {strategy.name: planned(strategy.name, trace, model) for strategy in strategies()}
    # Two processes show what float32 adds.
    for dtype in (torch.float64, torch.float32) if dist.get_world_size() == 2 else (torch.float64,):
        whole = copy.deepcopy(model).to(dtype)
        results = reference(whole, inputs)
        for strategy, plan in plans.items():
            found[f"{name} {strategy} {dtype}"] = strategy_error(whole, plan, inputs, results)
    return dict(found)


def trace_of(model: nn.Module, inputs: Inputs) -> RoutingTrace:
    """Return what the routers do at two noise levels."""
    with torch.no_grad(), TraceCollector(model) as collector:
        for seed, sigma in enumerate((0.9, 0.1)):
            with collector.at(sigma):
                model(**inputs(seed + 7))
    return collector.trace()


def planned(strategy: str, trace: RoutingTrace, model: nn.Module) -> Placement:
    """Plan for processes with a slower tier; the one strategy that streams gets too little memory."""
    dims, ranks = ModelDims.of(model), dist.get_world_size()
    described = Topology.processes(ranks).to_dict()
    described["devices"].append({"name": "host", "kind": "memory", "tier": "host"})
    described["links"] += [
        {"from": "host", "to": f"process{i}", "alpha_s": 1e-6, "beta_s_per_byte": 1e-9} for i in range(ranks)
    ]
    small = dims.shared_bytes + 5 * max(dims.expert_bytes)
    budget = Budget(restarts=1, windows=2, memory_bytes=small if strategy == "pin_and_stream" else None)
    return place(trace, Topology.from_dict(described), dims, strategy, budget)


def reference(whole: nn.Module, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """Run one process on the inputs of all ranks; gradients stay in ``whole``."""
    outputs = [first(whole(**on(inputs(r), whole))) for r in range(dist.get_world_size())]
    loss = sum(((out**2).mean() for out in outputs), outputs[0].new_zeros(())) / len(outputs)
    loss.backward()
    return [out.detach() for out in outputs], loss.detach()


def strategy_error(whole: nn.Module, plan: Placement, inputs: Inputs, results: tuple[list[Tensor], Tensor]) -> float:
    """Return the worst error over all layouts of the plan; one that streams experts has no gradients."""
    rank, (outputs, wanted), worst = dist.get_rank(), results, 0.0
    model = parallelize(copy.deepcopy(whole), None, plan, verify=False)
    model.zero_grad(set_to_none=True)
    mine = on(inputs(rank), whole)
    if plan.tiers:
        with torch.no_grad():
            return error(first(model(**mine)), outputs[rank])
    for layout in plan.layouts:
        switch(model, layout)
        out = first(model(**mine))
        loss = (out**2).mean()
        loss.backward()
        average_gradients(model)
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        worst = max(worst, error(out, outputs[rank]), error(total, wanted), gradient_error(model, whole))
        model.zero_grad(set_to_none=True)
    return worst


def on(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return inputs in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.dtype == torch.float64 else v for k, v in inputs.items()}


def dit_inputs(rank: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(rank)
    samples = 1 if rank == 1 else 2  # loads differ
    x = torch.randn(samples, 1, 8, 8, generator=draws, dtype=torch.float64)
    return {"x": x, "t": torch.tensor([10.0, 900.0])[:samples], "y": torch.tensor([1, 2])[:samples]}


def flux_inputs(rank: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(rank)
    found = _flux_inputs() | {"return_dict": False}
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        found[name] = torch.randn(found[name].shape, generator=draws, dtype=torch.float64)
    return found


@functools.cache
def _flux_inputs() -> dict[str, Tensor]:
    return dict(synthesise(zoo.tiny("FluxTransformer2DModel")))


def routed(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    moefx.transform(randomise_zeros(model), inputs, experts=EXPERTS, top_k=TOP_K, noise=0.2, router_std=0.5)
    return model.double()


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

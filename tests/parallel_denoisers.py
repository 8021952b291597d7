"""Whole denoisers on several ranks against one process."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.graph.inputs import synthesise
from moefx.parallel import (
    average_gradients,
    gather_experts,
    parallel_layers,
    parallelize,
)
from moefx.passes.placement import ModelDims, Topology, TraceCollector, place
from tests.placement_worker import EXPERTS, TOP_K, Numbers, error


def dit() -> Numbers:
    """DiT with three strategies: output and all gradients as one process has them."""
    errors: Numbers = {}
    for strategy in ("contiguous", "lpt", "minimax_time"):
        torch.manual_seed(0)
        model = routed(DiT(depth=2, width=16, label_dropout=0.0).double(), dit_inputs(0))
        errors[f"DiT {strategy}"] = denoiser_error(model, strategy, dit_inputs)
    return errors


def flux() -> Numbers:
    """FLUX, whose blocks are of two kinds."""
    model = routed(zoo.tiny("FluxTransformer2DModel").double(), flux_inputs(0))
    return {"FLUX": denoiser_error(model, "minimax_time", flux_inputs)}


def dit_inputs(rank: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 1, 8, 8, generator=draws, dtype=torch.float64)
    return {"x": x, "t": torch.tensor([10.0, 900.0]), "y": torch.tensor([1, 2])}


def flux_inputs(rank: int) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(rank)
    found = synthesise(zoo.tiny("FluxTransformer2DModel")) | {"return_dict": False}
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        found[name] = torch.randn(found[name].shape, generator=draws, dtype=torch.float64)
    return found


def routed(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    moefx.transform(randomise_zeros(model), inputs, experts=EXPERTS, top_k=TOP_K, noise=0.2, router_std=0.5)
    return model.double()


def denoiser_error(model: nn.Module, strategy: str, inputs: Callable[[int], dict[str, Tensor]]) -> float:
    """Return the worst relative error of the output and of every gradient."""
    rank, ranks, whole = dist.get_rank(), dist.get_world_size(), copy.deepcopy(model)
    with torch.no_grad(), TraceCollector(model) as collector, collector.at(0.5):
        model(**inputs(0))
    dims = ModelDims.of(model)
    parallelize(model, None, place(collector.trace(), Topology.processes(ranks), dims, strategy))
    outputs = [first(whole(**inputs(r))) for r in range(ranks)]
    (sum((out**2).mean() for out in outputs) / ranks).backward()
    out = first(model(**inputs(rank)))
    (out**2).mean().backward()
    average_gradients(model)
    worst, layers, reference = error(out, outputs[rank]), parallel_layers(model), dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        wanted = reference[name].grad
        if wanted is None or parameter.grad is None:
            assert wanted is None or not wanted.any(), name
            continue
        cut = prefix in layers and leaf in layers[prefix].stacked_names
        worst = max(worst, error(gather_experts(layers[prefix], parameter.grad) if cut else parameter.grad, wanted))
    return worst


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

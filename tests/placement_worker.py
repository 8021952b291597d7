"""What one rank of the parallel tests does; started by test_placement_parallel.py.

Each scenario returns numbers, and rank 0 writes the worst over all ranks to a file.
"""

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moefx.errors import MoefxError
from moefx.parallel import (
    ParallelExperts,
    average_gradients,
    gather_experts,
    gather_state_dict,
    parallel_layers,
    parallelize,
)
from moefx.passes.placement import Placement
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

WIDTH, HIDDEN, EXPERTS, TOP_K = 12, 20, 6, 2
Numbers = dict[str, float | str]


class Net(nn.Module):
    """Two routed FFNs with residuals between two linear layers."""

    def __init__(self, dtype: torch.dtype, *, gated: bool = False) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        act = (lambda up, gate: up * torch.nn.functional.silu(gate)) if gated else nn.functional.gelu
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.ffns = nn.ModuleList()
        for _ in range(2):
            weights = random_weights(WIDTH, HIDDEN, num_experts=EXPERTS, gated=gated, generator=draws)
            router = LinearRouter(WIDTH, EXPERTS, std=0.5, generator=draws)
            self.ffns.append(RoutedFFN(router, Experts(weights, act), top_k=TOP_K))
        for parameter in self.embed.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=draws) / 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for ffn in self.ffns:
            x = x + ffn(x)
        return x


def placement(*homes: tuple[int, ...]) -> Placement:
    names = tuple(f"process{i}" for i in range(dist.get_world_size()))
    layers = tuple(f"ffns.{i}" for i in range(len(homes)))
    return Placement(
        strategy="by hand", devices=names, layers=layers, primary=homes, objective=1.0, bound=1.0, balanced=1.0
    )


MIXED = ((0, 1, 1, 0, 1, 0), (1, 0, 1, 1, 1, 0))


def shards(tokens: list[int], dtype: torch.dtype) -> list[Tensor]:
    draws = torch.Generator().manual_seed(2)
    return [torch.randn(1, count, WIDTH, generator=draws, dtype=torch.float64).to(dtype) for count in tokens]


def compare(
    model: Net,
    where: Placement,
    tokens: list[int],
    dtype: torch.dtype,
    *,
    ddp: bool = False,
    mesh: DeviceMesh | None = None,
    **options: Any,
) -> Numbers:
    """Return the worst relative error of output, input gradient and parameter gradients against one process."""
    whole, parts, rank = copy.deepcopy(model), shards(tokens, dtype), dist.get_rank()
    inputs = [part.requires_grad_() for part in parts]
    outputs = [whole(part) for part in inputs]
    loss = sum(((out**2).sum() for out in outputs), torch.zeros((), dtype=dtype)) / len(outputs)
    loss.backward()

    parallel = parallelize(model, mesh, where, **options)
    runner = DistributedDataParallel(parallel) if ddp else parallel
    mine = inputs[rank].detach().clone().requires_grad_()
    out = runner(mine)
    (out**2).sum().backward()
    if not ddp:
        average_gradients(parallel)
    assert mine.grad is not None
    assert inputs[rank].grad is not None
    errors = {
        "output": error(out, outputs[rank]),
        "input": error(mine.grad, inputs[rank].grad * dist.get_world_size()),
        "replicated": 0.0,
        "experts": 0.0,
    }
    layers = parallel_layers(parallel)
    wanted = dict(whole.named_parameters())
    for name, parameter in parallel.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        stacked = prefix in layers and leaf in layers[prefix].stacked_names
        assert wanted[name].grad is not None
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = gather_experts(layers[prefix], grad) if stacked else grad
        key = "experts" if stacked else "replicated"
        errors[key] = max(errors[key], error(found, wanted[name].grad))
    return dict(errors)


def error(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-30))


def double() -> Numbers:
    return compare(Net(torch.float64), placement(*MIXED), [7, 16], torch.float64)


def single() -> Numbers:
    return compare(Net(torch.float32), placement(*MIXED), [33, 20], torch.float32)


def over_a_mesh() -> Numbers:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    return compare(Net(torch.float64), placement(*MIXED), [4, 9], torch.float64, mesh=mesh["expert"])


def gated_ddp() -> Numbers:
    return compare(Net(torch.float64, gated=True), placement(*MIXED), [9, 9], torch.float64, ddp=True)


def no_tokens_on_one_rank() -> Numbers:
    return compare(Net(torch.float64), placement(*MIXED), [11, 0], torch.float64)


def starved_rank() -> Numbers:
    """All tokens go to the experts of rank 0."""
    model = Net(torch.float64)
    for ffn in model.ffns:
        ffn.selection_bias = torch.tensor([0.0, 0.0, 0.0] + [-torch.inf] * 3)
    return compare(model, placement((0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, 1)), [5, 8], torch.float64)


def rank_without_experts() -> Numbers:
    return compare(Net(torch.float64), placement((0,) * 6, (1,) * 6), [5, 8], torch.float64)


def rank_without_gated_experts() -> Numbers:
    return compare(Net(torch.float64, gated=True), placement((0,) * 6, (1,) * 6), [5, 8], torch.float64)


def no_tokens_at_all() -> Numbers:
    model = parallelize(Net(torch.float64), None, placement(*MIXED))
    out = model(torch.zeros(1, 0, WIDTH, dtype=torch.float64))
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    return {"rows": float(out.shape[1])}


def checkpointed() -> Numbers:
    """Recomputing inside the backward pass makes the same collectives again, in the same order on all ranks."""
    model, x = parallelize(Net(torch.float64), None, placement(*MIXED)), shards([7, 3], torch.float64)[dist.get_rank()]
    model(x).square().sum().backward()
    wanted = [parameter.grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return {"gradients": max(error(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True))}


def compiled() -> Numbers:
    """One graph serves every routing: the splits are unbacked numbers in it."""
    torch._dynamo.config.capture_scalar_outputs = True
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    model = parallelize(Net(torch.float64), None, placement(*MIXED))
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    worst = 0.0
    for seed in range(3):
        draws = torch.Generator().manual_seed(10 * seed + dist.get_rank())
        x = torch.randn(1, 9, WIDTH, generator=draws, dtype=torch.float64)
        worst = max(worst, error(graph(x), model(x)))
    return {"output": worst, "recompiled": float(torch._dynamo.utils.counters["stats"]["unique_graphs"] - 1)}


def dropped_slots() -> Numbers:
    """Ids outside [0, E) contribute nothing."""
    model = Net(torch.float64)
    x, gates = shards([8, 8], torch.float64)[dist.get_rank()][0], torch.full((8, 2), 0.5, dtype=torch.float64)
    ids = torch.tensor([[0, -1], [6, 3], [5, 1], [-1, -1], [2, 4], [0, 1], [99, 5], [3, 2]])
    wanted = model.ffns[0].experts(x, ids, gates)
    return {"output": error(parallelize(model, None, placement(*MIXED)).ffns[0].experts(x, ids, gates), wanted)}


def state() -> Numbers:
    """Gathering gives the whole model back; the whole checkpoint loads into other placements."""
    model = Net(torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parallelize(model, None, placement(*MIXED))
    gathered = gather_state_dict(model)
    assert list(gathered) == list(before)
    assert all(torch.equal(gathered[name], before[name]) for name in before)
    other = parallelize(Net(torch.float32), None, placement((1, 1, 0, 0, 0, 0), (0, 1, 0, 1, 0, 1)))
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(gathered)
    again = gather_state_dict(other)
    assert all(torch.equal(again[name], before[name]) for name in before)
    x = shards([6, 6], torch.float32)[dist.get_rank()]
    copied = copy.deepcopy(other)
    return {"output": error(copied(x), model(x)), "held": float(sum(p.numel() for p in model.ffns.parameters()))}


def refusals() -> Numbers:
    """Every rank gets an error, whichever rank has the reason, and the model stays whole."""
    rank, found = dist.get_rank(), {}

    def refused(key: str, model: nn.Module, where: object) -> None:
        try:
            parallelize(model, None, where)  # type: ignore[arg-type]
        except MoefxError as caught:
            found[f"{key}@{rank}"] = f"{type(caught).__name__}: {caught}"
        kept = [m for m in model.modules() if isinstance(m, RoutedFFN)]
        assert not any(isinstance(m.experts, ParallelExperts) for m in kept)

    refused("world", Net(torch.float32), placement(*MIXED).model_copy(update={"devices": ("a", "b", "c")}))
    refused("layers", Net(torch.float32), placement(MIXED[0]))
    refused("experts", Net(torch.float32), placement((0, 1, 1), MIXED[1]))
    refused("dense", nn.Linear(2, 2), placement(*MIXED))
    refused("one rank", Net(torch.float32), placement(*MIXED) if rank == 0 else "no placement")
    refused("plans", Net(torch.float32), placement(MIXED[rank], MIXED[1]))
    other = Net(torch.float32)
    other.embed.weight.data[0, 0] += rank
    refused("weights", other, placement(*MIXED))
    other = Net(torch.float32)
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    return {key: text for part in gathered for key, text in part.items()}


SCENARIOS: tuple[Callable[[], Numbers], ...] = (
    double,
    single,
    over_a_mesh,
    gated_ddp,
    no_tokens_on_one_rank,
    starved_rank,
    rank_without_experts,
    rank_without_gated_experts,
    no_tokens_at_all,
    checkpointed,
    compiled,
    dropped_slots,
    state,
    refusals,
)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for scenario in SCENARIOS:
        everyone: list[Numbers] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, scenario())
        results[scenario.__name__] = {key: max(numbers[key] for numbers in everyone) for key in everyone[0]}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()

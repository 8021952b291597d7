"""What one rank of a large job holds and does, without the job: a fake process group that answers at once.

``python -m tests.parallel_scale RANKS ...``: some ranks one after another, each with a model of two routed layers;
prints a JSON. Nothing with numbers from the wire is run: exchanges are only written down.
"""

import json
import os
import sys
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from moefx.parallel import parallel_layers, parallelize
from moefx.passes.placement import ModelDims, Placement, wire_bytes
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

WIDTH, HIDDEN, TOP_K, LAYERS, TOKENS = 8, 12, 2, 2, 16
TRACED = int(os.environ.get("TRACED_RANKS", "64"))


class Net(torch.nn.Module):
    """Routed layers with two experts per rank."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.ffns = torch.nn.ModuleList()
        for _ in range(LAYERS):
            weights = random_weights(WIDTH, HIDDEN, num_experts=experts, generator=draws)
            router = LinearRouter(WIDTH, experts, std=0.5, generator=draws)
            self.ffns.append(RoutedFFN(router, Experts(weights, torch.nn.functional.gelu), top_k=TOP_K))


def plan(model: Net, ranks: int) -> Placement:
    """Place at random: some ranks hold no expert of a layer, others several."""
    draws = np.random.default_rng(ranks)
    homes = tuple(tuple(int(g) for g in draws.integers(0, ranks, 2 * ranks)) for _ in range(LAYERS))
    names = tuple(f"rank{g}" for g in range(ranks))
    scores = {"objective": 1.0, "bound": 1.0, "balanced": 1.0}
    return Placement(strategy="drawn", devices=names, layers=ModelDims.of(model).layers, primary=homes, **scores)


def exchanges(graph: fx.Graph) -> list[Any]:
    """Return the exchanges of a layer; each is waited for once, and the experts run grouped."""
    names = [str(node.target) for node in graph.nodes]
    found = [node for node in graph.nodes if "all_to_all_single" in str(node.target)]
    assert sum("wait_tensor" in name for name in names) == len(found)
    assert sum("grouped" in name for name in names) == 2
    return found


def one_rank(rank: int, ranks: int) -> dict[str, Any]:
    """Return what a rank holds, and the exchanges of each of its layers."""
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    model = Net(2 * ranks)
    where, dims = plan(model, ranks), ModelDims.of(model)
    parallelize(model, None, where, verify=False)
    order, told = [], []
    for layer in parallel_layers(model).values():
        if ranks > TRACED:  # each size of an exchange is a symbol of the trace: 13 s for 256 ranks
            told.append([layer.roster.slots_per_rank, [layer.roster.slots_per_rank[rank]] * ranks])
            continue
        inputs = torch.randn(TOKENS, WIDTH), torch.randint(0, 2 * ranks, (TOKENS, TOP_K)), torch.rand(TOKENS, TOP_K)
        with torch.no_grad():
            traced = make_fx(lambda *a, f=layer: f(*a), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
        found = exchanges(traced.graph)
        order.append([(str(node.target), node.args[0].meta["val"].ndim) for node in found])
        told.append([list(found[0].args[2]), list(found[0].args[1])])  # numbers: to each rank, from each
    dist.destroy_process_group()
    held = sum(p.nbytes for p in model.parameters())
    return {"held": held, "planned": int(where.bytes_per_device(dims)[rank]), "order": order, "told": told}


def ranks_to_look_at(ranks: int) -> list[int]:
    """Return a few ranks, two of larger jobs."""
    return sorted({0, 1, ranks // 2, ranks - 1}) if ranks <= TRACED else [0, ranks - 1]


def check(ranks: int) -> dict[str, Any]:
    """Compare several ranks of a job with each other and with the plan."""
    found = {rank: one_rank(rank, ranks) for rank in ranks_to_look_at(ranks)}
    first = next(iter(found.values()))
    pairs = [(a, b, i) for a in found for b in found for i in range(LAYERS)]
    model = Net(2 * ranks)
    needed = plan(model, ranks).bytes_per_device(ModelDims.of(model))
    kept = ModelDims.of(model).shared_bytes
    return {
        "exchanges": len(first["order"][0]) if first["order"] else None,
        "same order": all(one["order"] == first["order"] for one in found.values()),
        "sent is received": all(found[a]["told"][i][0][b] == found[b]["told"][i][1][a] for a, b, i in pairs),
        "held as planned": all(one["held"] == one["planned"] for one in found.values()),
        "experts in all": int(needed.sum() - ranks * kept) == sum(p.nbytes for p in model.parameters()) - kept,
        "held": sorted({one["held"] for one in found.values()}),
        **bytes_of_a_step(ranks),
    }


def bytes_of_a_step(ranks: int) -> dict[str, float]:
    """Return the predicted bytes of random choices, against rows counted one by one."""
    draws, model = np.random.default_rng(0), Net(2 * ranks)
    where, dims = plan(model, ranks), ModelDims.of(model)
    chosen = [draws.integers(0, 2 * ranks, (TOKENS, LAYERS, TOP_K)) for _ in range(ranks)]
    rows = 0
    for rank, ids in enumerate(chosen):
        for i in range(LAYERS):
            rows += int((np.asarray(where.primary[i])[ids[:, i]] != rank).sum())
    counts = 8 * sum(2 * ranks * (ranks - 1) for _ in range(LAYERS))
    return {"predicted": float(wire_bytes(chosen, where, dims).sum()), "counted": 2.0 * rows * WIDTH * 4 + counts}


def main(worlds: list[int]) -> None:
    torch.set_num_threads(1)
    print(json.dumps({ranks: check(ranks) for ranks in worlds}))


if __name__ == "__main__":
    main([int(ranks) for ranks in sys.argv[1:]])

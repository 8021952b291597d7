"""Time the exchanges of placed experts between real processes.

    torchrun --nproc_per_node 2 benchmarks/parallel.py --json out.json

Every process owns its share of the tokens. Paths through the experts are drawn from hidden groups, one expert per
token and layer. What is timed is the rows of all layers, without the experts between them:

* ``home``: to the expert and back in each layer, experts placed in order;
* ``home, once``: two experts per token; the same, but a token is sent to a process at most once;
* ``floating``: a token stays where its expert is until the next layer, and goes home after the last;
* ``floating, placed``: the same with experts placed by affinity.

Fitted and random placements give the rank correlation of predicted and measured times. Least of the rounds, after a
barrier, of the slowest process. Two aims are printed beside what was reached: ``floating, placed`` takes at most half
the time of ``home``, and the rank correlation is above 0.9. The run ends in less than five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.stats import spearmanr

from moefx.parallel import count_wire_bytes
from moefx.parallel.exchange import exchange
from moefx.passes.placement import Budget, ModelDims, Topology, place, trace_of_choices

IDs = NDArray[np.int64]
LEAST_RATIO, LEAST_CORRELATION = 2.0, 0.9


def draw_paths(tokens: int, layers: int, experts: int, groups: int, *, seed: int = 0) -> IDs:
    """Return the expert of each token in each layer ``[N, L]``: six in seven stay in their hidden group."""
    draws = np.random.default_rng(seed)
    group_LE = np.stack([draws.permutation(experts) % groups for _ in range(layers)])
    group_N, paths = draws.integers(0, groups, tokens), np.empty((tokens, layers), dtype=np.int64)
    for i in range(layers):
        group_N = np.where(draws.random(tokens) < 1 / 7, draws.integers(0, groups, tokens), group_N)
        for g in range(groups):
            mine = np.flatnonzero(group_N == g)
            paths[mine, i] = draws.choice(np.flatnonzero(group_LE[i] == g), len(mine))
    return paths


def owners(paths: IDs, homes: IDs, ranks: int) -> IDs:
    """Return where each token is before the first layer, at each layer, and after the last ``[N, L+2]``."""
    start = np.arange(len(paths)) % ranks
    at = np.take_along_axis(homes, paths.T, axis=1).T
    return np.concatenate([start[:, None], at, start[:, None]], axis=1)


def home_trips(paths: IDs, homes: IDs, ranks: int) -> IDs:
    """Return the same if every token goes home after each layer ``[N, 2L+1]``."""
    at = owners(paths, homes, ranks)
    stops = np.repeat(at[:, :1], 2 * paths.shape[1] + 1, axis=1)
    stops[:, 1::2] = at[:, 1:-1]
    return stops


def hops(stops: IDs, ranks: int) -> list[IDs]:
    """Return the rows between each pair of processes for each exchange ``[G, G]``."""
    pairs = (stops[:, :-1] * ranks + stops[:, 1:]).T
    return [np.bincount(column, minlength=ranks * ranks).reshape(ranks, ranks) for column in pairs]


def run(counts: list[IDs], width: int, rank: int) -> Callable[[], None]:
    """Return a function that makes the exchanges of this process."""
    sizes = [(c[rank].tolist(), c[:, rank].tolist()) for c in counts]
    buffers = [torch.randn(sum(sent), width) for sent, _ in sizes]

    @torch.no_grad()
    def once() -> None:
        for rows, (sent, received) in zip(buffers, sizes, strict=True):
            exchange(rows, sent, received, dist.group.WORLD)

    return once


def measure(jobs: dict[str, list[IDs]], width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time all jobs in turn and return the least time of the slowest process, and the bytes between processes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    calls = {name: run(counts, width, rank) for name, counts in jobs.items()}
    times = torch.full((rounds, len(calls)), torch.inf, dtype=torch.float64)
    for r in range(rounds):
        for j, call in enumerate(calls.values()):
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[r, j] = time.perf_counter() - begin
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    found = {}
    for j, (name, call) in enumerate(calls.items()):
        with count_wire_bytes(ranks) as sent_G:
            call()
        sent_G[rank] = 0
        total = torch.tensor(int(sent_G.sum()))
        dist.all_reduce(total)
        predicted = sum(int(c.sum() - np.trace(c)) for c in jobs[name]) * width * 4
        assert int(total) == predicted, f"{name}: {int(total)} bytes on the wire, {predicted} predicted"
        found[name] = {"ms": 1e3 * float(times[:, j].min()), "MB": predicted / 1e6}
    return found


def once_per_rank(paths: IDs, second: IDs, homes: IDs, ranks: int, *, once: bool) -> list[IDs]:
    """Return the exchanges of tokens with two experts each, there and back."""
    start = np.arange(len(paths)) % ranks
    counts = []
    for i in range(paths.shape[1]):
        first, other = homes[i][paths[:, i]], homes[i][second[:, i]]
        pairs = [start * ranks + first, (start * ranks + other)[(first != other) if once else slice(None)]]
        there = np.bincount(np.concatenate(pairs), minlength=ranks * ranks).reshape(ranks, ranks)
        counts += [there, there.T]
    return counts


def comparison(options: argparse.Namespace, paths: IDs, ranks: int) -> dict[str, list[IDs]]:
    """Return the exchanges of each way to move tokens."""
    layers, experts = paths.shape[1], options.experts
    trace = trace_of_choices(paths[None, None, :, :, None], experts=experts)
    dims = ModelDims(trace.layers, trace.experts, (1,) * layers, 0, (4 * options.width,) * layers, (1.0,) * layers)
    plan = place(trace, Topology.processes(ranks), dims, "affinity", Budget(restarts=4, seconds=20))
    placed = np.stack([np.asarray(row) for row in plan.primary])
    in_order = np.tile(np.arange(experts) * ranks // experts, (layers, 1))
    second = draw_paths(len(paths), layers, experts, options.groups, seed=1)
    return {
        "home": hops(home_trips(paths, in_order, ranks), ranks),
        "home, placed": hops(home_trips(paths, placed, ranks), ranks),
        "floating": hops(owners(paths, in_order, ranks), ranks),
        "floating, placed": hops(owners(paths, placed, ranks), ranks),
        "home, two experts": once_per_rank(paths, second, in_order, ranks, once=False),
        "home, two experts, once": once_per_rank(paths, second, in_order, ranks, once=True),
    }


def correlation(options: argparse.Namespace, paths: IDs, ranks: int) -> float:
    """Return the rank correlation of predicted and measured times of placements from random to placed by affinity."""
    draws, layers = np.random.default_rng(2), paths.shape[1]
    jobs = comparison(options, paths, ranks)
    names = ("home", "floating", "floating, placed")
    mixed = {name: jobs[name] for name in names}
    for i in range(options.placements):
        scale = (i + 1) / options.placements
        kept = draws.random(len(paths)) < scale
        homes = np.stack([draws.permutation(options.experts) % ranks for _ in range(layers)])
        mixed[f"random {i}"] = hops(owners(paths[kept], homes, ranks), ranks)
    topology = Topology.processes(ranks)
    predicted = [sum(topology.exchange_seconds(c * options.width * 4.0) for c in counts) for counts in mixed.values()]
    measured = [row["ms"] for row in measure(mixed, options.width, options.rounds).values()]
    return float(spearmanr(predicted, measured).statistic)


def main() -> None:
    """Run the benchmark; rank 0 reports."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--placements", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    ranks, paths = dist.get_world_size(), draw_paths(options.tokens, options.layers, options.experts, options.groups)
    found = measure(comparison(options, paths, ranks), options.width, options.rounds)
    order = correlation(options, paths, ranks)
    if dist.get_rank() == 0:
        for name, row in found.items():
            print(f"{name:24} {row['ms']:9.1f} ms {row['MB']:9.1f} MB")
        ratio = found["home"]["ms"] / found["floating, placed"]["ms"]
        print("bytes on the wire are the predicted ones in all rows")
        print(f"home, in order / floating, placed: {ratio:.2f} times (aim: at least {LEAST_RATIO:g})")
        print(f"rank correlation of predicted and measured times: {order:.3f} (aim: above {LEAST_CORRELATION:g})")
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {ranks} processes, torch {torch.__version__}"
        result = {"machine": machine, "load_average": os.getloadavg(), "exchanges": found}
        result |= {"rank_correlation": order, "ratio": ratio, "aims": {"ratio": LEAST_RATIO, "rank": LEAST_CORRELATION}}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

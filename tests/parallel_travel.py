"""Scenarios of how rows travel: in chunks, behind shared experts, once per rank, and how many bytes that is."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from moefx.parallel import (
    count_wire_bytes,
    parallelize,
    switch,
)
from moefx.routing import DenseFFN, random_weights
from tests.parallel_copies import with_copies
from tests.parallel_training import HOMES
from tests.placement_worker import EXPERTS, TOP_K, WIDTH, Net, Numbers, compare, error, placement, shards


def chunks_overlap() -> Numbers:
    """Three parts of the tokens of which one rank has fewer than three, with copies, and with gates."""
    plain = compare(Net(torch.float64), placement(*HOMES), [17, 2], torch.float64, chunks=3)
    gated = compare(Net(torch.float64, gated=True), with_copies(local_first=False), [9, 14], torch.float64, chunks=2)
    empty = compare(Net(torch.float64), placement((0,) * 6, (1,) * 6), [5, 0], torch.float64, chunks=2)
    return {key: max(plain[key], gated[key], empty[key]) for key in plain}


def shared_experts_overlap() -> Numbers:
    """Shared experts computed while rows travel give the same, and are called once."""
    found: Numbers = {}
    for chunks in (1, 3):
        net = Net(torch.float64)
        draws = torch.Generator().manual_seed(3)
        for ffn in net.ffns:
            ffn.shared = DenseFFN(random_weights(WIDTH, 10, generator=draws), nn.functional.gelu).double()
        names = list(net.state_dict())
        calls: list[int] = []
        net.ffns[0].shared.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        options = {"chunks": chunks, "overlap_shared": True}
        for key, value in compare(net, placement(*HOMES), [17, 2], torch.float64, **options).items():
            found[key] = max(float(value), float(found.get(key, 0.0)))
        found["names"] = float(list(net.state_dict()) != names)
        # `compare` runs the model of one process on two parts and this one on its own; hooks are shared by copies.
        found["calls"] = max(float(found.get("calls", 0.0)), float(sum(calls) != 3))
    return found


def once_per_rank() -> Numbers:
    """The same sums, with dropped slots, copies, gates, an empty rank and no tokens."""
    plain = compare(Net(torch.float64), placement(*HOMES), [17, 6], torch.float64, once=True)
    gated = compare(Net(torch.float64, gated=True), with_copies(local_first=True), [9, 14], torch.float64, once=True)
    empty = compare(Net(torch.float64), placement((0,) * 6, (1,) * 6), [5, 0], torch.float64, once=True)
    found = {key: max(plain[key], gated[key], empty[key]) for key in plain}
    model = Net(torch.float64)
    x, gates = shards([8, 8], torch.float64)[dist.get_rank()][0], torch.full((8, 2), 0.5, dtype=torch.float64)
    ids = torch.tensor([[0, -1], [6, 3], [5, 1], [-1, -1], [2, 4], [0, 1], [99, 5], [3, 2]])
    wanted = model.ffns[0].experts(x, ids, gates)
    for options in ({"once": True}, {"chunks": 3}):
        parallel = parallelize(Net(torch.float64), None, placement(*HOMES), **options)
        found[f"dropped {options}"] = error(parallel.ffns[0].experts(x, ids, gates), wanted)
    return found


def once_saves_bytes() -> Numbers:
    """Rows sent once are those of the pairs of token and rank, counted from the choices."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, x = Net(torch.float64), shards([40, 40], torch.float64)[rank]
    chosen: list[np.ndarray] = []
    for ffn in whole.ffns:
        ffn.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].numpy().copy()))
    sent: dict[bool, np.ndarray] = {}
    for once in (False, True):
        model = parallelize(Net(torch.float64), None, placement(*HOMES), once=once)
        with torch.no_grad(), count_wire_bytes(ranks) as sent[once]:
            model(x)
    with torch.no_grad():
        whole(x)
    pairs, rows = (np.zeros(ranks, dtype=np.int64) for _ in range(2))
    for ids, home in zip(chosen, HOMES, strict=True):
        rows += np.bincount(np.array(home)[ids.reshape(-1)], minlength=ranks)
        for g in range(ranks):
            pairs[g] += (np.array(home)[ids] == g).any(axis=1).sum()
    gathered = [torch.zeros(ranks, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(gathered, torch.from_numpy(pairs))
    everyone = np.stack([g.numpy() for g in gathered])
    there, back = pairs * (WIDTH * 8 + TOP_K * (4 + 8)), everyone[:, rank] * WIDTH * 8
    predicted = there + back + 8 * len(HOMES)
    other = 1 - rank
    return {
        "difference": float(abs(int(predicted[other]) - int(sent[True][other]))),
        "not fewer": float(pairs[other] >= rows[other]),
    }


def random_schedules_end() -> Numbers:
    """Fifty random mixes of layouts, loads, chunks and switches: none hangs, none differs."""
    draws, worst = np.random.default_rng(0), 0.0
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = Net(torch.float64)
    modes: tuple[dict[str, Any], ...] = ({}, {"chunks": 2}, {"chunks": 5}, {"once": True})
    models = [parallelize(Net(torch.float64), None, placement(*HOMES), verify=False, **mode) for mode in modes]
    for _ in range(50):
        model = models[int(draws.integers(len(models)))]
        homes = draws.integers(0, ranks, (2, EXPERTS)).tolist()
        switch(model, placement(*map(tuple, homes)))
        tokens = draws.integers(0, 9, ranks).tolist()
        x = shards(tokens, torch.float64)[rank].requires_grad_()
        out = model(x)
        worst = max(worst, error(out, whole(x)))
        if draws.random() < 0.5:
            out.sum().backward()
            model.zero_grad(set_to_none=True)
    return {"output": worst}


def bytes_on_the_wire() -> Numbers:
    """What is sent equals what the choices of each rank and the placement say, to the byte, there and back."""
    rank, ranks, worst = dist.get_rank(), dist.get_world_size(), 0
    whole, parts = Net(torch.float32), shards([13, 40], torch.float32)
    chosen: list[np.ndarray] = []
    for ffn in whole.ffns:
        ffn.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].numpy().copy()))
    with torch.no_grad():
        whole(parts[rank])
    model = parallelize(Net(torch.float32), None, placement(*HOMES))
    with torch.no_grad(), count_wire_bytes(ranks) as sent:
        model(parts[rank])
    rows = np.zeros((ranks, ranks), dtype=np.int64)  # from, to
    mine = np.zeros(ranks, dtype=np.int64)
    for ids, home in zip(chosen, HOMES, strict=True):
        mine += np.bincount(np.array(home)[ids.reshape(-1)], minlength=ranks)
    gathered = [torch.zeros(ranks, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(gathered, torch.from_numpy(mine))
    rows[:] = np.stack([g.numpy() for g in gathered])
    counts = 8 * sum(np.bincount(home, minlength=ranks) for home in HOMES)  # one number per expert of the receiver
    for other in range(ranks):
        predicted = int(rows[rank, other] + rows[other, rank]) * WIDTH * 4 + int(counts[other])
        worst = max(worst, abs(predicted - int(sent[other])))
    assert rows.sum() == sum(p.shape[1] for p in parts) * TOP_K * len(HOMES)
    return {"difference": float(worst), "unsent": float(rows[rank].sum() == 0)}

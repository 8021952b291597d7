"""What one rank of the tests of copies, windows, meshes and checkpoints does; started by torchrun.

``parallel_worker.py GROUP FOLDER``: each scenario of the group returns numbers, and rank 0 writes the worst over all
ranks to ``FOLDER/GROUP.json``.
"""

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import MoefxError
from moefx.graph.inputs import synthesise
from moefx.parallel import (
    average_expert_gradients,
    average_gradients,
    count_wire_bytes,
    expert_parameters,
    gather_experts,
    gather_state_dict,
    load_shards,
    parallel_layers,
    parallelize,
    save_shards,
    switch,
)
from moefx.passes.placement import ModelDims, Placement, Replica, Topology, TraceCollector, Window, place
from moefx.routing import DenseFFN, random_weights
from tests.placement_worker import EXPERTS, TOP_K, WIDTH, Net, Numbers, compare, error, placement, shards

HOMES = ((0, 1, 1, 0, 1, 0), (1, 0, 1, 1, 1, 0))
OTHERS = ((1, 1, 0, 0, 1, 0), (0, 0, 0, 1, 1, 1))
SAMPLES, STEPS, HALF = 12, 6, 3


def with_copies(*, local_first: bool) -> Placement:
    """Experts 0 and 2 of the first layer have a copy, and all experts of the second."""
    ranks = dist.get_world_size()
    copies = [Replica(layer=0, expert=e, device=(HOMES[0][e] + 1) % ranks, share=0.3) for e in (0, 2)]
    copies += [Replica(layer=1, expert=e, device=(HOMES[1][e] + 1) % ranks, share=0.5) for e in range(EXPERTS)]
    return placement(*HOMES).model_copy(update={"replicas": tuple(copies), "local_first": local_first})


def copies_by_share() -> Numbers:
    return compare(Net(torch.float64), with_copies(local_first=False), [9, 14], torch.float64)


def copies_local_first() -> Numbers:
    return compare(Net(torch.float64, gated=True), with_copies(local_first=True), [9, 14], torch.float64)


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


def copies_follow_training_and_loading() -> Numbers:
    """Without gradients copies keep their weights, but never those of before a step."""
    whole, model = Net(torch.float64), parallelize(Net(torch.float64), None, with_copies(local_first=True))
    x, worst = shards([8, 8], torch.float64)[dist.get_rank()], 0.0
    for scale in (1.0, 3.0):
        state = {name: tensor * scale for name, tensor in Net(torch.float64).state_dict().items()}
        whole.load_state_dict(state)
        model.load_state_dict(state)
        for _ in range(2):
            with torch.no_grad():
                worst = max(worst, error(model(x), whole(x)))
    everything = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everything, x)
    for net, inputs in ((whole, everything), (model, [x])):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for part in inputs:
            ((net(part) ** 2).sum() / len(inputs)).backward()
        if net is model:
            average_gradients(net)
        optimizer.step()
    with torch.no_grad():
        worst = max(worst, error(model(x), whole(x)))
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


def batch(step: int) -> Tensor:
    draws = torch.Generator().manual_seed(100 + step)
    return torch.randn(SAMPLES, 3, WIDTH, generator=draws, dtype=torch.float64)


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


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    before: Callable[[int], object],
    average: Callable[[nn.Module], object] = average_gradients,
) -> list[float]:
    """Train on this rank's part of the global batch and return the global losses."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if optimizer.param_groups else (1, 0)
    losses = []
    for step in steps:
        before(step)
        parts = batch(step).tensor_split(ranks)
        loss = (model(parts[rank]) ** 2).sum() / SAMPLES
        (loss * ranks).backward()  # the average over ranks is then the sum over samples
        average(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def reference() -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses and final weights of one process."""
    model = Net(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(STEPS):
        loss = (model(batch(step)) ** 2).sum() / SAMPLES
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses, model.state_dict()


def distance(losses: list[float], wanted: list[float]) -> float:
    return float(np.abs(np.array(losses) / np.array(wanted) - 1).max())


def windows_switch_without_losing_optimizer_state() -> Numbers:
    """Every step at another noise level, in three layouts, one of which leaves a rank empty."""
    empty = tuple((0,) * EXPERTS for _ in range(2))
    windows = (Window(sigma=0.6, primary=OTHERS), Window(sigma=0.3, primary=empty))
    plan = placement(*HOMES).model_copy(update={"windows": windows})
    model = parallelize(Net(torch.float64), None, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sigmas, switched = (0.9, 0.5, 0.1, 0.2, 0.6, 0.8), []
    losses = train(model, optimizer, range(STEPS), lambda step: switched.append(switch(model, sigmas[step], optimizer)))
    assert switched == [False, True, True, False, True, True], switched
    wanted, weights = reference()
    found = gather_state_dict(model)
    return {
        "losses": distance(losses, wanted),
        "weights": max(error(found[name], weights[name]) for name in weights if weights[name].is_floating_point()),
    }


def switch_refusals() -> Numbers:
    """All ranks refuse together, and nothing moves."""
    rank, found = dist.get_rank(), 0
    model = parallelize(Net(torch.float64), None, placement(*HOMES))
    optimizer = torch.optim.AdamW(model.parameters())
    before = [layer.local_experts for layer in parallel_layers(model).values()]
    three = placement(*OTHERS).model_copy(update={"devices": ("a", "b", "c")})
    cases: list[tuple[str, Callable[[], object]]] = [
        ("on 3", lambda: switch(model, three, optimizer)),
        ("differs from rank 0", lambda: switch(model, placement(*(HOMES if rank else OTHERS)), optimizer)),
    ]
    for says, call in cases:
        try:
            call()
        except MoefxError as refused:
            found += says in str(refused)
    x = shards([4, 4], torch.float64)[rank]
    model(x).sum().backward()
    try:
        switch(model, placement(*OTHERS), optimizer)
    except MoefxError as refused:
        found += "has a gradient" in str(refused)
    assert before == [layer.local_experts for layer in parallel_layers(model).values()]
    return {"missed": float(3 - found)}


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


def spread(ranks: int) -> Placement:
    return placement(*(tuple((e + layer) % ranks for e in range(EXPERTS)) for layer in range(2)))


def save_half_way(folder: Path) -> Numbers:
    model = parallelize(Net(torch.float64), None, spread(dist.get_world_size()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = train(model, optimizer, range(HALF), lambda _: None)
    save_shards(model, folder / "checkpoint", optimizer, extra={"step": 1})
    save_shards(model, folder / "checkpoint", optimizer, extra={"step": HALF})  # replaces the first
    return {"losses": distance(losses, reference()[0][:HALF])}


def resume(folder: Path) -> Numbers:
    model = parallelize(Net(torch.float64), None, spread(dist.get_world_size()))
    for parameter in model.parameters():
        parameter.data.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    extra = load_shards(model, folder / "checkpoint", optimizer)
    losses = train(model, optimizer, range(extra["step"], STEPS), lambda _: None)
    wanted, weights = reference()
    found = gather_state_dict(model)
    return {
        "losses": distance(losses, wanted[HALF:]),
        "weights": max(error(found[name], weights[name]) for name in weights if weights[name].is_floating_point()),
    }


def damaged_checkpoint(folder: Path) -> Numbers:
    """A missing and a corrupt shard are refused on all ranks, and nothing is half loaded."""
    model, missed = parallelize(Net(torch.float64), None, spread(dist.get_world_size())), 0
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, says in (("missing", "rank-00001.safetensors is missing"), ("corrupt", "another size or hash")):
        try:
            load_shards(model, folder / name)
            missed += 1
        except MoefxError as refused:
            missed += says not in str(refused)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return {"missed": float(missed)}


def lose_a_rank(folder: Path) -> Numbers:
    """The last rank is killed between two steps; what the others see is written down."""
    model, rank = parallelize(Net(torch.float64), None, spread(dist.get_world_size())), dist.get_rank()
    x = shards([5] * dist.get_world_size(), torch.float64)[rank]
    model(x).sum().backward()
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        model(x).sum().backward()
    except MoefxError as lost:
        report = {"seconds": time.monotonic() - begin, "error": f"{type(lost).__name__}: {lost}"}
        (folder / f"lost-{rank}.json").write_text(json.dumps(report))
    os._exit(0)  # the process group is broken: leave without saying goodbye


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


GROUPS: dict[str, list[Callable[[], Numbers]] | Callable[[Path], Numbers]] = {
    "two": [
        copies_by_share,
        copies_local_first,
        copies_follow_training_and_loading,
        chunks_overlap,
        shared_experts_overlap,
        once_per_rank,
        once_saves_bytes,
        random_schedules_end,
        bytes_on_the_wire,
        windows_switch_without_losing_optimizer_state,
        switch_refusals,
    ],
    "flux": [flux],
    "four": [a_mesh_refuses_as_one, experts_times_data, under_ddp, under_fsdp],
    "dit": [dit],
    "save": save_half_way,
    "resume": resume,
    "damaged": damaged_checkpoint,
    "lost": lose_a_rank,
}


def main(names: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results = {}
    for name in names.split("+"):
        group = GROUPS[name]
        runs = group if isinstance(group, list) else [group]
        for run in runs:
            everyone: list[Numbers] = [{} for _ in range(dist.get_world_size())]
            numbers = run() if isinstance(group, list) else run(folder)  # type: ignore[call-arg]
            dist.all_gather_object(everyone, numbers)
            results[run.__name__] = {key: max(part[key] for part in everyone) for key in everyone[0]}
    if dist.get_rank() == 0:
        (folder / f"{names}-{dist.get_world_size()}.json").write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""What one rank of the tests of scheduled graphs does; started by test_schedule_graph.py.

Each scenario returns numbers, and rank 0 writes the worst over all ranks to a file.
"""

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.dit import DiT
from moefx import zoo
from moefx.errors import MoefxError, PlanError
from moefx.graph.signature import Inputs
from moefx.model.specialise import specialise
from moefx.parallel import (
    Program,
    approximate,
    average_gradients,
    count_wire_bytes,
    gather_experts,
    parallel_layers,
    schedule,
    schedule_specialised,
    switch,
)
from moefx.passes.placement import ModelDims, Placement, Topology, TraceCollector, Window, place
from moefx.passes.schedule import CapacityTable, inexact, order_digest
from moefx.routing import DenseFFN, Experts, LinearRouter, RoutedFFN, random_weights
from tests.parallel_copies import with_copies
from tests.parallel_denoisers import dit_inputs, flux_inputs, routed
from tests.parallel_training import HOMES, OTHERS
from tests.placement_worker import EXPERTS, WIDTH, Net, Numbers, error, placement, shards

EXAMPLE = torch.zeros(1, 16, WIDTH, dtype=torch.float64)


def first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def compare(
    model: nn.Module, where: Placement, inputs: list[Inputs], example: Inputs = None, **options: Any
) -> Numbers:
    """Return the worst relative error of outputs and of all gradients of a scheduled graph against one process."""
    rank, whole = dist.get_rank(), copy.deepcopy(model)
    outputs = [first(call(whole, one)) for one in inputs]
    (sum(((out**2).mean() for out in outputs), torch.zeros((), dtype=torch.float64)) / len(outputs)).backward()
    program = schedule(model, None, where, example or inputs[0], **options)
    out = first(call(program, inputs[rank]))
    (out**2).mean().backward()
    average_gradients(model)
    layers, wanted, worst = parallel_layers(model), dict(whole.named_parameters()), 0.0
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        reference = wanted[name].grad
        stacked = prefix in layers and leaf in layers[prefix].stacked_names
        if reference is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        worst = max(worst, error(gather_experts(layers[prefix], grad) if stacked else grad, reference))
    return {"output": error(out, outputs[rank]), "gradients": worst}


def call(model: nn.Module, inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*(inputs or ()))


def tokens(*counts: int) -> list[Inputs]:
    return [(part,) for part in shards(list(counts), torch.float64)]


def ways_of_tokens() -> Numbers:
    """One part, three parts, once per rank, copies, gates; another number of tokens than was traced; a starved rank."""
    empty = placement((0,) * 6, (1,) * 6)
    runs: dict[str, Numbers] = {
        "plain": compare(Net(torch.float64), placement(*HOMES), tokens(17, 6), (EXAMPLE,), chunks=1),
        "chunks": compare(Net(torch.float64, gated=True), placement(*HOMES), tokens(17, 2), (EXAMPLE,), chunks=3),
        "once": compare(Net(torch.float64), placement(*HOMES), tokens(17, 6), (EXAMPLE,), chunks=2, once=True),
        "copies": compare(Net(torch.float64), with_copies(local_first=False), tokens(9, 14), (EXAMPLE,), chunks=2),
        "local": compare(Net(torch.float64), with_copies(local_first=True), tokens(9, 14), (EXAMPLE,), once=True),
        "empty": compare(Net(torch.float64, gated=True), empty, tokens(5, 1), (EXAMPLE,), chunks=2),
        "empty once": compare(Net(torch.float64), empty, tokens(5, 1), (EXAMPLE,), once=True),
    }
    return {f"{name} {key}": value for name, found in runs.items() for key, value in found.items()}


def shared_experts_move_behind_exchanges() -> Numbers:
    """On the clock the shared expert runs while rows travel, and so it does in the graph; results stay."""
    net, draws = Net(torch.float64), torch.Generator().manual_seed(3)
    for ffn in net.ffns:
        ffn.shared = DenseFFN(random_weights(WIDTH, 10, generator=draws), nn.functional.gelu).double()
    program = schedule(copy.deepcopy(net), None, placement(*HOMES), (EXAMPLE,), topology=slow(), chunks=1)
    names = [task.name for task in program.current.tasks]
    roles = {task.name: task for task in program.current.tasks}
    begun = next(n for n in names if roles[n].role == "dispatch" and roles[n].collective)
    ended = next(n for n in names if roles[n].role == "dispatch" and not roles[n].collective)
    between = [roles[n].role for n in names[names.index(begun) : names.index(ended)]]
    gained = program.current.before.total_s > 1.02 * program.current.timeline.total_s
    found = compare(net, placement(*HOMES), tokens(17, 6), (EXAMPLE,), topology=slow())
    return found | {"in between": float("shared" not in between), "not faster": float(not gained)}


def slow() -> Topology:
    """Two devices for which computing takes about as long as sending."""
    devices = [{"name": n, "flops_per_s": 1e7, "memory_bytes_per_s": 1e9} for n in ("a", "b")]
    links = [{"from": a, "to": b, "alpha_s": 1e-5, "beta_s_per_byte": 1e-7} for a, b in (("a", "b"), ("b", "a"))]
    return Topology.from_dict({"devices": devices, "links": links})


def denoisers() -> Numbers:
    """DiT and FLUX as graphs, with the number of chunks that the clock chooses."""
    found: Numbers = {}
    for name, build, inputs in (
        ("DiT", lambda: DiT(depth=2, width=16, label_dropout=0.0).double(), dit_inputs),
        ("FLUX", lambda: zoo.tiny("FluxTransformer2DModel").double(), flux_inputs),
    ):
        torch.manual_seed(0)
        model = routed(build(), inputs(0))
        with torch.no_grad(), TraceCollector(model) as collector, collector.at(0.5):
            model(**inputs(0))
        trace = collector.trace()
        where = place(trace, Topology.processes(2), ModelDims.of(model), "minimax_time")
        errors = compare(model, where, [inputs(0), inputs(1)], topology=slow(), trace=trace)
        found |= {f"{name} {key}": value for key, value in errors.items()}
    return found


def windows() -> Numbers:
    """A graph per layout; :func:`switch` decides which one runs, and one that nobody planned is refused."""
    plan = placement(*HOMES).model_copy(update={"windows": (Window(sigma=0.5, primary=OTHERS),)})
    whole, program = Net(torch.float64), schedule(Net(torch.float64), None, plan, (EXAMPLE,), chunks=2)
    x, worst, seen = shards([9, 14], torch.float64)[dist.get_rank()], 0.0, set()
    for sigma in (0.9, 0.4, 0.8):
        switch(program.model, sigma)
        worst = max(worst, error(program(x), whole(x)))
        seen.add(id(program.current))
    switch(program.model, placement((0,) * 6, (0,) * 6))
    try:
        program(x)
    except PlanError as refused:
        unplanned = float("does not have" not in str(refused))
    return {"output": worst, "graphs": float(len(seen) != 2), "refusal": unplanned}


def ranks_refuse_together() -> Numbers:
    """Graphs whose collectives differ, or an example that cannot be traced on one rank, are an error on every one."""
    rank, missed = dist.get_rank(), 0.0
    for options, words in (
        ({"chunks": 2 + rank}, "orders of collectives"),
        ({"memory_bytes": 1.0}, "memory"),
    ):
        try:
            schedule(Net(torch.float64), None, placement(*HOMES), (EXAMPLE,), **options)  # type: ignore[arg-type]
            missed += 1
        except PlanError as refused:
            missed += words not in str(refused)
    model = Net(torch.float64)
    try:
        schedule(model, None, placement(*HOMES), (EXAMPLE,) if rank == 0 else (torch.zeros(3),))
        missed += 1
    except MoefxError:  # one rank's inputs are wrong: every rank is told
        missed += any("rank" in name for name in model.state_dict())
        model(EXAMPLE)  # it is whole
    return {"missed": missed}


def orders_agree() -> Numbers:
    """Both ranks make the same collectives in the same order, though they hold different experts."""
    program = schedule(Net(torch.float64), None, placement(*HOMES), (EXAMPLE,), topology=slow(), chunks=3)
    everyone: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(everyone, order_digest(program.current.tasks))
    return {"differ": float(len(set(everyone)) != 1)}


def fixed_sizes() -> Numbers:
    """Messages of fixed sizes: too large, too small for some rank only, and far too small for all; gradients too."""
    found: Numbers = {}
    for name, caps in (("roomy", 40), ("tight", 9), ("tiny", 1)):
        table = CapacityTable((1.0,), np.full((1, 2, 2), caps))
        options: dict[str, Any] = {"capacity": table}
        for key, value in compare(Net(torch.float64), placement(*HOMES), tokens(17, 6), (EXAMPLE,), **options).items():
            found[f"{name} {key}"] = value
        empty = placement((0,) * 6, (1,) * 6)
        numbers = compare(Net(torch.float64, gated=True), empty, tokens(5, 1), (EXAMPLE,), **options)
        found |= {f"{name} empty {key}": value for key, value in numbers.items()}
        with_copy = compare(Net(torch.float64), with_copies(local_first=True), tokens(9, 14), (EXAMPLE,), **options)
        found |= {f"{name} copies {key}": value for key, value in with_copy.items()}
    return found


def bytes_of_fixed_sizes() -> Numbers:
    """What is sent is what the table says while all rows fit; with too small a table, the rest too."""
    rank, ranks, net = dist.get_rank(), dist.get_world_size(), Net(torch.float64)
    x, worst = shards([24, 24], torch.float64)[rank], 0.0
    with torch.no_grad():
        rows = sent_rows(net, x)
    everyone = [torch.zeros_like(rows) for _ in range(ranks)]
    dist.all_gather(everyone, rows)
    for caps in (48, 10):
        table = CapacityTable((1.0,), np.full((1, 2, ranks), caps))
        program = schedule(copy.deepcopy(net), None, placement(*HOMES), (EXAMPLE,), capacity=table)
        with torch.no_grad(), count_wire_bytes(ranks) as sent:
            program(x)
        counts = [8 * (HOMES[i].count(g) + 1) for g in range(ranks) for i in range(2)]
        other = 1 - rank
        wanted = 2 * 2 * caps * WIDTH * 8 + sum(counts[2 * other : 2 * other + 2])
        for i in range(2):
            there, back = (max(int(n) - caps, 0) for n in (everyone[rank][i, other], everyone[other][i, rank]))
            wanted += (there + back) * WIDTH * 8
        worst = max(worst, abs(wanted - int(sent[other])))
    return {"difference": worst, "all fitted": float(int(torch.stack(everyone).max()) <= 10)}


def sent_rows(net: Net, x: Tensor) -> Tensor:
    """Return how many rows of ``x`` each layer sends to each rank, ``[L, G]``, counted from the choices."""
    chosen: list[Tensor] = []
    hooks = [f.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].clone())) for f in net.ffns]
    net(x)
    for hook in hooks:
        hook.remove()
    homes = [torch.tensor(home)[ids.flatten()] for home, ids in zip(HOMES, chosen, strict=True)]
    return torch.stack([torch.bincount(home, minlength=dist.get_world_size()) for home in homes])


def drifting(steps: int, size: float) -> list[Tensor]:
    """Return inputs that change a little from step to step, for this rank."""
    draws = torch.Generator().manual_seed(5 + dist.get_rank())
    x = torch.randn(1, 40, WIDTH, generator=draws, dtype=torch.float64)
    way = torch.randn(1, 40, WIDTH, generator=draws, dtype=torch.float64)
    return [x + size * step * way for step in range(steps)]


def steps_go_on_from_steps() -> Numbers:
    """Delta steps are exact whether or not the changed rows fit; another batch is refused until told to forget."""
    found: Numbers = {}
    for name, places in (("roomy", 40), ("tight", 2)):
        whole = Net(torch.float64)
        changes = np.full((2, 2), places)
        program = schedule(Net(torch.float64), None, placement(*HOMES), (EXAMPLE,), changes=changes)
        worst, ways = 0.0, []
        for _ in range(2):
            program.forget()
            for x in drifting(5, 0.05):
                ways.append(next(way for (_, way), one in program.variants.items() if one is program.current))
                x = x.requires_grad_()
                again = x.detach().clone().requires_grad_()
                out, wanted = program(x), whole(again)
                out.square().sum().backward()
                wanted.square().sum().backward()
                assert x.grad is not None
                assert again.grad is not None
                worst = max(worst, error(out, wanted), error(x.grad, again.grad))
        found[name] = worst
        found[f"{name} ways"] = float(ways[0] != "first" or ways[1] != "delta" or ways[5] != "first")
        found[f"{name} starts anew"] = float((ways[1:5].count("first") > 0) != (name == "tight"))
        try:
            program(EXAMPLE)
            found["refused"] = 1.0
        except PlanError as refused:
            found["refused"] = float("forget()" not in str(refused))
    return found


def approximate_steps_keep_to_their_tolerance() -> Numbers:
    """The measured error is that of steps computed by hand on one process; above the tolerance all ranks refuse."""
    found: Numbers = {}
    steps, wanted = drifting(4, 0.02), {"frozen": 0.0, "stale": 0.0}
    whole, pasts = Net(torch.float64), dict[str, list[Any]]()
    with torch.no_grad():
        for step, x in enumerate(steps):
            for kind in wanted:
                out, pasts[kind] = by_hand(whole, x, kind, pasts.get(kind) if step else None)
                wanted[kind] = max(wanted[kind], error(out, whole(x)))
    for kind, by in wanted.items():
        everyone: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(everyone, by)
        program = schedule(Net(torch.float64), None, placement(*HOMES), (EXAMPLE,))
        runs = [[(x,) for x in steps]]
        try:
            approximate(program, kind, tolerance=max(everyone) / 2, runs=runs)
            found[f"{kind} allowed"] = 1.0
        except PlanError as refused:
            found[f"{kind} not named"] = float(f"{max(everyone):.3g}" not in str(refused))
        found[f"{kind} exact after"] = error(program(steps[1]), whole(steps[1]))
        approximate(program, kind, tolerance=2 * max(everyone), runs=runs)
        found[f"{kind} measured"] = abs(program.measured - max(everyone)) / max(everyone)
        found[f"{kind} zero"] = float(not program.measured > 1e-6)
        with torch.no_grad():
            program(steps[0])
            program(steps[1])
            names = {node.target for node in program.variants[0, kind].graph.nodes}
        found[f"{kind} listed"] = float(not inexact(program.variants[0, kind].graph))
        found[f"{kind} router"] = float((kind == "frozen") == ("ffns.0.router.weight" in names))
        try:
            program(steps[2])
            found[f"{kind} trained"] = 1.0
        except PlanError as refused:
            found[f"{kind} gradients"] = float("no_grad" not in str(refused))
    return found


def by_hand(net: Net, x: Tensor, kind: str, past: list[Any] | None) -> tuple[Tensor, list[Any]]:
    """Return one step of ``net`` with the choice, or the experts' result, of a step in the past."""
    x, kept = net.embed(x), []
    for i, ffn in enumerate(net.ffns):
        flat, routing = x.reshape(-1, WIDTH), ffn.route(x)
        frozen = past is not None and kind == "frozen"
        ids, gates = past[i] if frozen else (routing.experts, routing.gates)  # type: ignore[index]
        y = ffn.experts(flat, ids, gates)
        kept.append((ids, gates) if kind == "frozen" else y)
        x = x + (past[i] if past is not None and kind == "stale" else y).view_as(x)
    return x, kept


class TwoKinds(nn.Module):
    """A routed FFN that the timestep decides, and one that the tokens decide."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        by_time = LinearRouter(0, EXPERTS, tap_dim=16, embed_timestep=True)
        with torch.no_grad():
            by_time.tap_weight.copy_(torch.randn(EXPERTS, 16, generator=draws))
        routers = by_time, LinearRouter(WIDTH, EXPERTS, std=0.5, generator=draws)
        self.ffns = nn.ModuleList(
            RoutedFFN(r, Experts(random_weights(WIDTH, 20, num_experts=EXPERTS, generator=draws), nn.functional.gelu))
            for r in routers
        )

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + self.ffns[0](x, timestep)
        return x + self.ffns[1](x)


def layers_that_the_timestep_decides() -> Numbers:
    """They are dense in every variant: half of the exchanges are gone; other timesteps run the divided model."""
    rank, ranks, whole = dist.get_rank(), dist.get_world_size(), TwoKinds().double().eval()
    times, example = [900.0, 500.0, 100.0], (torch.zeros(2, 9, WIDTH, dtype=torch.float64), torch.full((2,), 900.0))
    special = specialise(copy.deepcopy(whole), times, example)
    schedule_specialised(special, None, placement(*HOMES), example, chunks=1)
    x, worst, sent = shards([9, 9], torch.float64)[rank].expand(2, 9, WIDTH).contiguous(), 0.0, {}
    with torch.no_grad():
        for time in (*times, 321.0):
            t = torch.full((2,), time)
            with count_wire_bytes(ranks) as sent[time]:
                out = special(x, t)
            worst = max(worst, error(out, whole(x, t)))
    other, rows = 1 - rank, sum(isinstance(m, Program) for m in special.variants)
    fewer = all(int(sent[time][other]) < int(sent[321.0][other]) for time in times)
    exchanges = [sum(t.collective for t in one.current.tasks) for one in special.variants]
    return {
        "output": worst,
        "fallbacks": float(special.fallbacks != 1),
        "programs": float(rows != len(special.variants)),
        "not fewer bytes": float(not fewer),
        "exchanges": float(any(count != 3 for count in exchanges)),
    }


SCENARIOS: tuple[Callable[[], Numbers], ...] = (
    ways_of_tokens,
    shared_experts_move_behind_exchanges,
    denoisers,
    windows,
    ranks_refuse_together,
    orders_agree,
    fixed_sizes,
    bytes_of_fixed_sizes,
    steps_go_on_from_steps,
    approximate_steps_keep_to_their_tolerance,
    layers_that_the_timestep_decides,
)


def main(out: Path, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for scenario in (s for s in SCENARIOS if not names or s.__name__ in names):
        everyone: list[Numbers] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, scenario())
        results[scenario.__name__] = {key: max(numbers[key] for numbers in everyone) for key in everyone[0]}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results, indent=1))
    dist.destroy_process_group()

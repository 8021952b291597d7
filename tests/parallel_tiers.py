"""Scenarios of ranks whose device is too small for their share of the experts."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moefx.errors import MoefxError
from moefx.parallel import gather_state_dict, parallel_layers, parallelize, save_shards, switch
from moefx.passes.placement import Placement
from tests.parallel_copies import with_copies
from tests.parallel_training import HOMES, OTHERS
from tests.placement_worker import EXPERTS, HIDDEN, WIDTH, Net, Numbers, error, placement, shards

EXPERT_BYTES = 8 * (2 * WIDTH * HIDDEN + HIDDEN)
LINES = 400  # more than what is left of cache lines at the ends of an expert's tensors


def shared_bytes(model: nn.Module) -> int:
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return total - 2 * EXPERTS * EXPERT_BYTES


def streamed(where: Placement, budget: int | str | None, **options: Any) -> tuple[float, list[int], float]:
    """Return the error over two passes, how many experts of each layer stay here, and bytes of weights held here."""
    whole, x = Net(torch.float64), shards([9, 14, 5, 0], torch.float64)[dist.get_rank()]
    model = parallelize(copy.deepcopy(whole), None, where, budget=budget, staging=2, **options)
    with torch.no_grad():
        worst = max(error(model(x), whole(x)) for _ in range(2))
    engines = [layer.engine[0] for layer in parallel_layers(model).values()]
    kept = [len(getattr(engine, "pins", ())) for engine in engines]
    return worst, kept, float(sum(p.nbytes for p in model.parameters()))


def small_devices_stream() -> Numbers:
    """One rank keeps some experts and the other all; with copies, chunks, once, an empty rank, and a plan's tiers."""
    rank, whole = dist.get_rank(), Net(torch.float64)
    small = shared_bytes(whole) + 4 * (EXPERT_BYTES + LINES)  # two experts, and two to come
    budget = small if rank == 0 else "1GB"
    found: Numbers = {}
    found["plain"], kept, held = streamed(placement(*HOMES), budget)
    mine = [sum(home == rank for home in row) for row in HOMES]
    found["kept"] = float(sum(kept) != 2 if rank == 0 else kept != mine)
    found["held"] = float(held >= sum(p.nbytes for p in whole.parameters()) - 2 * EXPERTS * EXPERT_BYTES + EXPERT_BYTES)
    found["copies"] = streamed(with_copies(local_first=False), budget)[0]
    found["chunks"] = streamed(placement(*HOMES), budget, chunks=2)[0]
    found["once"] = streamed(placement(*HOMES), budget, once=True)[0]
    found["empty"] = streamed(placement((0,) * EXPERTS, (1,) * EXPERTS), budget)[0]
    tiers = tuple(tuple("host" if e % 2 else "device" for e in range(EXPERTS)) for _ in HOMES)
    planned = placement(*HOMES).model_copy(update={"tiers": tiers})
    found["planned"], kept, _ = streamed(planned, None)
    wanted = [sum(home == rank and e % 2 == 0 for e, home in enumerate(row)) for row in HOMES]
    found["pins"] = float(kept != wanted)
    return found


def too_little_memory_is_refused() -> Numbers:
    """One rank's budget is too small: all ranks say by how much, nothing is divided; and what needs weights says so."""
    rank, model, missed = dist.get_rank(), Net(torch.float64), 0
    try:
        parallelize(model, None, placement(*HOMES), budget=1000 if rank == 1 else "1GB")
        missed += 1
    except MoefxError as refused:
        missed += not all(part in str(refused) for part in ("short by", "bytes"))
        missed += ("rank 1 refused" in str(refused)) != (rank != 1)
    assert type(model.ffns[0].experts).__name__ == "Experts"
    parallelize(model, None, placement(*HOMES), budget="1GB")
    for call in (
        lambda: switch(model, placement(*OTHERS)),
        lambda: gather_state_dict(model),
        lambda: save_shards(model, "nowhere"),
        lambda: model.load_state_dict(Net(torch.float64).state_dict()),
        lambda: model(shards([3, 3, 3, 3], torch.float64)[rank].requires_grad_()),
    ):
        try:
            call()
            missed += 1
        except MoefxError as refused:
            missed += "streamed" not in str(refused)
    return {"missed": float(missed)}

"""Scenarios of layouts that change between steps, on two ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from moefx.errors import MoefxError
from moefx.parallel import (
    gather_state_dict,
    parallel_layers,
    parallelize,
    switch,
)
from moefx.passes.placement import Window
from tests.parallel_training import HOMES, OTHERS, STEPS, distance, reference, train
from tests.placement_worker import EXPERTS, Net, Numbers, error, placement, shards


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

"""Scenarios of copies of experts, on two ranks."""

import torch
import torch.distributed as dist

from moefx.parallel import (
    average_gradients,
    parallelize,
)
from moefx.passes.placement import Placement, Replica
from tests.parallel_training import HOMES
from tests.placement_worker import EXPERTS, Net, Numbers, compare, error, placement, shards


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

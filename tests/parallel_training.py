"""Training on each rank's part of a batch, and on all of it in one process; shared by the scenarios."""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moefx.parallel import (
    average_gradients,
)
from tests.placement_worker import WIDTH, Net

HOMES = ((0, 1, 1, 0, 1, 0), (1, 0, 1, 1, 1, 0))
OTHERS = ((1, 1, 0, 0, 1, 0), (0, 0, 0, 1, 1, 1))
SAMPLES, STEPS, HALF = 12, 6, 3


def batch(step: int) -> Tensor:
    draws = torch.Generator().manual_seed(100 + step)
    return torch.randn(SAMPLES, 3, WIDTH, generator=draws, dtype=torch.float64)


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

"""Switch-DiT's diffusion prior: neighbouring timesteps share units, distant ones do not (arXiv 2403.09176).

A unit is one expert of one layer, so the loss is one term for the whole model: give it the routers' probabilities.

Legend: T timesteps of the schedule, L layers, N experts of a layer, U = L·N units, B samples.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefx.errors import OptionError

EPSILON = 1e-6


def prior_map(timesteps: int, layers: int, experts: int, top_k: int, *, power: float = 4.0) -> Tensor:
    """Return the prior ``[T, U]`` of 0 and 1: a window of L·K units that starts at ``(t/(T−1))^power (U − L·K)``.

    L = 28, N = 3, K = 2 gives windows of 56 of 84 units at offsets 0, 0, 2, 9, 28 for t = 0, 250, 500, 750, 999.
    """
    if not 1 <= top_k <= experts or timesteps < 2:
        raise OptionError(f"a prior of {top_k} of {experts} experts", found=f"{timesteps} timesteps", do="k <= experts")
    units, window = layers * experts, layers * top_k
    t = torch.linspace(0, 1, timesteps, dtype=torch.float64)
    offset = (t**power * (units - window)).round().long().unsqueeze(1)
    unit = torch.arange(units)
    return ((unit >= offset) & (unit < offset + window)).to(torch.float32)


def match_units(chosen_TU: Tensor, prior_TU: Tensor) -> NDArray[np.int64]:
    """Return for every unit of the model the column of the prior that costs least in all (L1, bipartite matching).

    Runs on the host, without gradient; the released code does so at every step, which is not needed: every some
    hundred steps will do.
    """
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(chosen_TU.detach().T.double().cpu(), prior_TU.T.double().cpu(), p=1)
    _, columns = linear_sum_assignment(cost.numpy())
    return np.asarray(columns, dtype=np.int64)


def prior_loss(probabilities: list[Tensor], prior_BU: Tensor) -> Tensor:
    """Return the mean Jensen–Shannon divergence between routing and prior.

    Args:
        probabilities: per layer ``[B, N]``, each row summing to one.
        prior_BU: rows of the matched prior at the batch's timesteps.
    """
    p = torch.cat(probabilities, -1) / len(probabilities)
    q = (prior_BU / prior_BU.sum(-1, keepdim=True)).to(p)
    middle = (p + q) / 2

    def divergence(a: Tensor) -> Tensor:
        return (a * ((a + EPSILON).log() - (middle + EPSILON).log())).sum(-1)

    return (divergence(p) + divergence(q)).mean() / 2

"""Measure a running job: what a byte costs between its ranks, and how fast each computes.

Random matrices of counts are exchanged, with hot spots among them, and two models of the time are fitted by least
squares: one bus that carries all bytes, as loopback does, and one way in and one way out per rank, as behind a switch.
The one with the smaller error becomes the topology. Each time is the least of several repeats, of the slowest rank.

Legend: M matrices, G ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from scipy.optimize import nnls

from moefx.errors import InputError
from moefx.passes.placement.topology import Topology

Array = NDArray[np.float64]

_LARGEST_BYTES = 4 * 2**20
_MATRIX = 512


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Args:
        topology: of the better model.
        model: ``bus`` or ``switch``.
        alpha_s: fitted latency of one exchange.
        beta_s_per_byte: fitted price of a byte.
        error: mean relative error of the better model.
        other_error: of the other.
        matrices: how many were exchanged.
    """

    topology: Topology
    model: str
    alpha_s: float
    beta_s_per_byte: float
    error: float
    other_error: float
    matrices: int


def measure(*, matrices: int = 24, repeats: int = 5, seed: int = 0) -> Measurement:
    """Measure the ranks of the job; every rank calls it and gets the same answer.

    Raises:
        InputError: ``torch.distributed`` is not running, or there is one rank only.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        found = "one rank" if dist.is_available() and dist.is_initialized() else "torch.distributed is not running"
        do = "start at least two: torchrun --no-python --nproc-per-node 2 moefx topology --measure"
        raise InputError("measure the links of a job", found=found, do=do)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    sent = list(random_counts(dist.get_world_size(), matrices, np.random.default_rng(seed)))
    seconds_M = np.array([_exchange_seconds(bytes_GG, repeats, device) for bytes_GG in sent])
    rate = _flops_per_s(repeats, device)
    rates = [torch.zeros_like(rate) for _ in range(dist.get_world_size())]
    dist.all_gather(rates, rate)
    return fit(np.array(sent), seconds_M, [float(r) for r in rates])


def random_counts(ranks: int, matrices: int, draws: np.random.Generator) -> list[Array]:
    """Return matrices of bytes ``[G, G]``: of all sizes, even and with one hot receiver; nothing on the diagonal."""
    found = []
    for m in range(matrices):
        size = _LARGEST_BYTES * float(draws.uniform(0.02, 1.0))
        bytes_GG = draws.uniform(0, size, (ranks, ranks))
        if m % 3 == 2:
            bytes_GG[:, draws.integers(ranks)] *= 3
        np.fill_diagonal(bytes_GG, 0)
        found.append(np.floor(bytes_GG))
    return found


def fit(bytes_MGG: Array, seconds_M: Array, flops_per_s: list[float]) -> Measurement:
    """Return the better of both models of the time of exchanges."""
    total_M = bytes_MGG.sum(axis=(1, 2))
    busiest_M = np.maximum(bytes_MGG.sum(axis=1).max(axis=1), bytes_MGG.sum(axis=2).max(axis=1))
    fits = {name: _fit(work_M, seconds_M) for name, work_M in (("bus", total_M), ("switch", busiest_M))}
    model, other = sorted(fits, key=lambda name: fits[name][2])
    alpha, beta, error = fits[model]
    topology = _topology(model, alpha, beta, flops_per_s)
    return Measurement(topology, model, alpha, beta, error, fits[other][2], len(seconds_M))


def _fit(work_M: Array, seconds_M: Array) -> tuple[float, float, float]:
    """Return latency, price of a byte (neither negative) and mean relative error; errors count relative to the time."""
    (alpha, beta), _ = nnls(np.stack([np.ones_like(work_M), work_M], axis=1) / seconds_M[:, None], np.ones_like(work_M))
    error = np.abs((alpha + beta * work_M) / seconds_M - 1).mean()
    return float(alpha), float(beta), float(error)


def _topology(model: str, alpha: float, beta: float, flops_per_s: list[float]) -> Topology:
    fastest = max(flops_per_s)
    names = [f"rank{i}" for i in range(len(flops_per_s))]
    devices: list[dict[str, Any]] = [
        {"name": name, "flops_per_s": rate, "speed": rate / fastest}
        for name, rate in zip(names, flops_per_s, strict=True)
    ]
    if model == "bus":
        price = {"alpha_s": alpha, "beta_s_per_byte": beta, "resource": "bus"}
        links = [{"from": a, "to": b, **price} for a in names for b in names if a != b]
    else:
        # A row crosses two links in turn; the busier of all decides, so each has the whole price.
        devices.append({"name": "switch", "kind": "switch"})
        price = {"alpha_s": alpha / 2, "beta_s_per_byte": beta}
        links = [{"from": a, "to": b, **price} for name in names for a, b in ((name, "switch"), ("switch", name))]
    return Topology.from_dict({"devices": devices, "links": links})


def _exchange_seconds(bytes_GG: Array, repeats: int, device: torch.device) -> float:
    rank = dist.get_rank()
    sent, received = bytes_GG[rank].astype(int).tolist(), bytes_GG[:, rank].astype(int).tolist()
    rows = torch.zeros(sum(sent), dtype=torch.uint8, device=device)
    out = torch.empty(sum(received), dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(out, rows, received, sent)
        _wait(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        best = min(best, float(slowest))
    return best


def _flops_per_s(repeats: int, device: torch.device) -> torch.Tensor:
    """Return the rate of a float32 matrix product on this rank, all ranks computing at the same time."""
    a = torch.randn(_MATRIX, _MATRIX, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return torch.tensor(2 * _MATRIX**3 / best, dtype=torch.float64, device=device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

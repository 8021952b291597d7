"""Measure a running job: what a byte costs between its ranks, and how fast each computes.

Random matrices of counts are exchanged, with hot spots among them, and models of the time are fitted by least squares,
from one price for all bytes to one for each link; see :mod:`moefx.passes.placement.link_fit`. The one that predicts
best becomes the topology. Each time is the least of several repeats, of the slowest rank.

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

from moefx.errors import InputError
from moefx.passes.placement.link_fit import LinkFit, fit_links
from moefx.passes.placement.topology import Topology

Array = NDArray[np.float64]

_LARGEST_BYTES = 4 * 2**20
_MATRIX = 512
_FEWEST, _MOST = 40, 200


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Args:
        topology: of the better model.
        model: ``bus``, ``switch``, ``ways`` or ``links``.
        alpha_s: fitted latency of one exchange.
        beta_s_per_byte: fitted price of a byte between each pair of ranks, ``[G, G]``.
        error: mean relative error of the model, on exchanges it was not fitted to.
        errors: of all models, by name.
        matrices: how many were exchanged.
    """

    topology: Topology
    model: str
    alpha_s: float
    beta_s_per_byte: Array
    error: float
    errors: dict[str, float]
    matrices: int


def measure(*, matrices: int | None = None, repeats: int = 5, seed: int = 0) -> Measurement:
    """Measure the ranks of the job; every rank calls it and gets the same answer.

    Args:
        matrices: how many exchanges; by default 40, or three for each link if that is more, up to 200.
        repeats: of each.
        seed: of the bytes that are exchanged.

    Raises:
        InputError: ``torch.distributed`` is not running, or there is one rank only.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        found = "one rank" if dist.is_available() and dist.is_initialized() else "torch.distributed is not running"
        do = "start at least two: torchrun --no-python --nproc-per-node 2 moefx topology --measure"
        raise InputError("measure the links of a job", found=found, do=do)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    ranks = dist.get_world_size()
    count = min(max(_FEWEST, 3 * ranks * (ranks - 1)), _MOST) if matrices is None else matrices
    sent = list(random_counts(ranks, count, np.random.default_rng(seed)))
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
    """Return the model of the time of exchanges that predicts best, as a topology."""
    best, *others = fit_links(bytes_MGG, seconds_M)
    errors = {found.model: found.error for found in (best, *others)}
    topology = _topology(best, flops_per_s)
    return Measurement(topology, best.model, best.alpha_s, best.link_s_per_byte, best.error, errors, len(seconds_M))


def _topology(found: LinkFit, flops_per_s: list[float]) -> Topology:
    fastest = max(flops_per_s)
    names = [f"rank{i}" for i in range(len(flops_per_s))]
    devices: list[dict[str, Any]] = [
        {"name": name, "flops_per_s": rate, "speed": rate / fastest}
        for name, rate in zip(names, flops_per_s, strict=True)
    ]
    if found.model in ("bus", "links"):
        links = [
            {
                "from": a,
                "to": b,
                "alpha_s": found.alpha_s,
                "beta_s_per_byte": float(found.link_s_per_byte[i, j]),
                "resource": "bus",
            }
            for i, a in enumerate(names)
            for j, b in enumerate(names)
            if i != j
        ]
    else:
        # A row crosses two links in turn; the busier of all decides, so each has the whole price.
        devices.append({"name": "switch", "kind": "switch"})
        half = {"alpha_s": found.alpha_s / 2}
        links = [
            {"from": a, "to": b, **half, "beta_s_per_byte": float(price)}
            for i, name in enumerate(names)
            for a, b, price in ((name, "switch", found.out_s_per_byte[i]), ("switch", name, found.in_s_per_byte[i]))
        ]
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

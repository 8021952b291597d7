"""Which neuron belongs to which slice: partitions of a dense network's hidden layer, as pure functions of tensors.

Every function returns labels ``[F]`` (int64, slice of each neuron) with the same number of neurons in every slice, as
`moefx.routing.initialise.shards` wants them. All are deterministic; ties go to the lowest slice or neuron.

=====================  ==========================================  ===================================================
function               brings together                             used by
=====================  ==========================================  ===================================================
`contiguous`           neighbours                                  FactorLLM, Union-of-Experts
`shuffled`             nothing                                     LLaMA-MoE (random), a baseline
`dealt`                important with unimportant                  Dense2MoE
`balanced_clusters`    like rows (weights, or markers)             MoEfication, D2DMoE, EMoE
`around`               what is like given centres                  CMoE
`coactive`             neurons that fire together                  MoEfication (co-activation graph)
`claimed`              what each data cluster needs most           LLaMA-MoE (gradient)
=====================  ==========================================  ===================================================

Legend: F neurons, E slices of m = F/E, P features.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moefx.errors import OptionError
from moefx.routing.initialise import Seed, generator

Metric = Literal["cosine", "euclidean", "manhattan"]
EXACT = 4096  # neurons up to which an assignment is solved exactly: its cost matrix is F x F
EXACT_STEP = 512  # the same for one of the many assignments of a clustering, in cubic time each


def contiguous(neurons: int, slices: int) -> Tensor:
    """Return labels of neighbouring neurons."""
    return torch.arange(neurons) // _width(neurons, slices)


def shuffled(neurons: int, slices: int, seed: Seed) -> Tensor:
    """Return random labels."""
    return contiguous(neurons, slices)[torch.randperm(neurons, generator=generator(seed))]


def dealt(score_F: Tensor, slices: int) -> Tensor:
    """Deal neurons by falling score like cards: every slice gets its share of the important ones (Dense2MoE)."""
    _width(len(score_F), slices)
    labels = torch.empty(len(score_F), dtype=torch.int64)
    labels[ranked(score_F)] = torch.arange(len(score_F)) % slices
    return labels


def ranked(score_F: Tensor) -> Tensor:
    """Return the neurons by falling score, ties by index."""
    return score_F.cpu().sort(descending=True, stable=True).indices


def balanced_clusters(
    rows_FP: Tensor, slices: int, seed: Seed, *, metric: Metric = "cosine", iterations: int = 20, restarts: int = 3
) -> Tensor:
    """k-means in which every cluster has exactly F/E members; the best of some starts.

    Args:
        rows_FP: what neurons are compared by, such as their rows of ``w_in`` (of ``w_gate`` where there is one).
        slices: E.
        seed: of the starts, which are k-means++.
        metric: cosine normalises the rows first.
        iterations: at most; it stops when nothing moves.
        restarts: number of starts.
    """
    rows = rows_FP.detach().double().cpu()
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=1)
    draws = generator(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(restarts):
        labels = around(rows, _spread(rows, slices, draws), metric=metric, exact=EXACT_STEP)
        for _ in range(iterations):
            moved = around(rows, _centres(rows, labels, slices), metric=metric, exact=EXACT_STEP)
            if torch.equal(moved, labels):
                break
            labels = moved
        centres = _centres(rows, labels, slices)
        spent = float((rows - centres[labels]).square().sum())
        if best is None or spent < best[0]:
            best = spent, labels
    assert best is not None
    return best[1]


def around(rows_FP: Tensor, centres_EP: Tensor, *, metric: Metric = "euclidean", exact: int = EXACT) -> Tensor:
    """Return the balanced labels of least total distance to given centres (CMoE: markers and L1)."""
    rows, centres = rows_FP.double().cpu(), centres_EP.double().cpu()
    cost = torch.cdist(rows, centres, p=1) if metric == "manhattan" else _squared(rows, centres)
    return assign(cost, exact=exact)


def coactive(coactivation_FF: Tensor, slices: int, seed: Seed) -> Tensor:
    """Cut the co-activation graph into E equal parts with as little weight as possible between them.

    Spectral: balanced k-means in the space of the E lowest eigenvectors of the normalised Laplacian (Ng, Jordan and
    Weiss, 2001), rows normalised. MoEfication (arXiv 2110.01786) calls METIS and repairs the balance by random moves.
    """
    weight = coactivation_FF.double().cpu()
    weight = ((weight + weight.T) / 2).fill_diagonal_(0)
    scale = weight.sum(1).clamp_min(1e-30).rsqrt()
    vectors = torch.linalg.eigh(weight * scale[:, None] * scale).eigenvectors[:, -slices:]
    return balanced_clusters(vectors, slices, seed, metric="cosine")


def claimed(score_EF: Tensor) -> Tensor:
    """Give neurons to the slice that wants them most, best pair first, until it is full (LLaMA-MoE, arXiv 2406.16554).

    Args:
        score_EF: how much data cluster e needs neuron f.
    """
    slices, neurons = score_EF.shape
    room = [_width(neurons, slices)] * slices
    labels = torch.full((neurons,), -1, dtype=torch.int64)
    for pair in ranked(score_EF.reshape(-1)).tolist():
        e, f = divmod(pair, neurons)
        if labels[f] < 0 and room[e]:
            labels[f] = e
            room[e] -= 1
    return labels


def assign(cost_FE: Tensor, *, exact: int = EXACT, epsilon: float = 0.01) -> Tensor:
    """Return the balanced labels of least total cost: the transport of F unit masses to E equal sinks.

    Exact by linear assignment with every sink repeated F/E times (scipy) up to ``exact`` neurons, whose cost matrix is
    F × F. Beyond that the entropic transport plan (Sinkhorn; ``epsilon`` relative to the mean cost), which needs F × E,
    rounded by handing out places in the order of regret.
    """
    neurons, slices = cost_FE.shape
    width = _width(neurons, slices)
    cost = cost_FE.detach().double().cpu()
    if neurons > exact:
        return _rounded(sinkhorn(cost, epsilon=epsilon), width)
    from scipy.optimize import linear_sum_assignment

    _, places = linear_sum_assignment(cost.repeat_interleave(width, dim=1).numpy())
    return torch.from_numpy(places).long() // width


def sinkhorn(cost_FE: Tensor, *, epsilon: float = 0.01, iterations: int = 200) -> Tensor:
    """Return log of the entropic transport plan ``[F, E]`` with row sums 1 and column sums F/E (Cuturi, 2013)."""
    neurons, slices = cost_FE.shape
    log = -cost_FE / (epsilon * cost_FE.mean().clamp_min(1e-30))
    target = torch.tensor(neurons / slices, dtype=log.dtype).log()
    for _ in range(iterations):
        log = log - log.logsumexp(0, keepdim=True) + target
        log = log - log.logsumexp(1, keepdim=True)
    return log


def _rounded(log_FE: Tensor, width: int) -> Tensor:
    """Hand out places: the neuron that would lose most by its second choice goes first; full sinks drop out."""
    room = torch.full((log_FE.shape[1],), width)
    labels = torch.full((log_FE.shape[0],), -1, dtype=torch.int64)
    open_FE = log_FE.clone()
    while (labels < 0).any():
        free = torch.nonzero(labels < 0).flatten()
        best = open_FE[free].topk(min(2, log_FE.shape[1]), dim=1)
        regret = best.values[:, 0] - best.values[:, -1]
        for i in ranked(regret.nan_to_num(posinf=torch.inf)).tolist():
            neuron, sink = int(free[i]), int(best.indices[i, 0])
            if room[sink] == 0:
                continue  # the others choose again without it
            labels[neuron] = sink
            room[sink] -= 1
        open_FE[:, room == 0] = -torch.inf
    return labels


def _spread(rows: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Choose starting centres far from each other (k-means++, Arthur and Vassilvitskii, 2007)."""
    chosen = [int(torch.randint(len(rows), (1,), generator=draws))]
    for _ in range(count - 1):
        distance = _squared(rows, rows[chosen]).min(1).values
        distance[chosen] = 0  # not exactly 0 in floating point
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        chosen.append(int(torch.multinomial(weights, 1, generator=draws)))
    return rows[chosen]


def _centres(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    total = rows.new_zeros(count, rows.shape[1]).index_add_(0, labels, rows)
    return total / torch.bincount(labels, minlength=count).clamp(min=1).unsqueeze(1)


def _squared(rows: Tensor, centres: Tensor) -> Tensor:
    cross = rows @ centres.T
    return (rows.square().sum(1, keepdim=True) - 2 * cross + centres.square().sum(1)).clamp_min(0)


def _width(neurons: int, slices: int) -> int:
    if slices < 1 or neurons % slices:
        raise OptionError(
            f"cut {neurons} neurons into {slices} slices",
            found="unequal slices",
            do=f"choose a divisor: {[e for e in range(1, 65) if neurons % e == 0]}",
        )
    return neurons // slices

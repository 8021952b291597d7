"""Instances with and without hidden structure, and exact optima of tiny ones by integer programming."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import lil_matrix

from moefx.passes.placement import ModelDims, Placement, RoutingTrace


def affinity_instance(
    kind: str, layers: int = 28, experts: int = 64, devices: int = 8, tokens: int = 20_000
) -> RoutingTrace:
    """Return drawn top-1 paths through the layers as a trace.

    ``planted``: successors prefer the same hidden device; ``dirichlet``: each expert has a few preferred successors;
    ``weak``: hardly any structure. Popularity falls as rank**-0.6 in the first layer.
    """
    draws = np.random.default_rng(0)
    popularity = np.arange(1, experts + 1) ** -0.6
    hidden = (
        [draws.permutation(np.repeat(np.arange(devices), experts // devices)) for _ in range(layers)]
        if kind == "planted"
        else []
    )
    steps = []
    for i in range(layers - 1):
        if kind == "planted":
            prefer = np.where(hidden[i][:, None] == hidden[i + 1][None], 6.0, 1.0)
            weight = prefer * draws.gamma(0.3, 1, (experts, experts))
        elif kind == "dirichlet":
            weight = draws.gamma(0.05, 1, (experts, experts)) * draws.permutation(popularity)[None] + 1e-4
        else:
            weight = draws.gamma(1.0, 1, (experts, experts))
        steps.append(np.cumsum(weight / weight.sum(axis=1, keepdims=True), axis=1))
    at = draws.choice(experts, size=tokens, p=popularity / popularity.sum())
    load, flows = [np.bincount(at, minlength=experts)], []
    for step in steps:
        after = (step[at] < draws.random(tokens)[:, None]).sum(axis=1).clip(0, experts - 1)
        flows.append(np.bincount(at * experts + after, minlength=experts**2).reshape(experts, experts))
        load.append(np.bincount(after, minlength=experts))
        at = after
    names = tuple(f"layers.{i}" for i in range(layers))
    loads = np.array(load, dtype=np.float64)[None]
    return RoutingTrace(np.ones(1), names, (experts,) * layers, loads, affinity=np.array(flows))


def dims_of(trace: RoutingTrace) -> ModelDims:
    """Return sizes that price rows and weights."""
    size = len(trace.layers)
    return ModelDims(trace.layers, trace.experts, (4000,) * size, 500, (64,) * size, (2000.0,) * size)


def stay(trace: RoutingTrace, placement: Placement) -> float:
    """Return the share of the flow that stays on its device, counted pair by pair of devices."""
    assert trace.affinity is not None
    kept = 0.0
    for i, flow in enumerate(trace.affinity):
        for g in range(len(placement.devices)):
            kept += flow[np.ix_(placement.experts_of(i, g), placement.experts_of(i + 1, g))].sum()
    return float(kept / trace.affinity.sum())


def imbalance(trace: RoutingTrace, placement: Placement) -> float:
    """Return the mean over layers of the busiest device's load against the mean device's, over all levels together."""
    found = []
    for i in range(len(trace.layers)):
        rows = [trace.load[:, i, placement.experts_of(i, g)].sum() for g in range(len(placement.devices))]
        found.append(max(rows) / np.mean(rows))
    return float(np.mean(found))


def exact_stay(trace: RoutingTrace, devices: int) -> float:
    """Return the largest share of the flow that equally full devices can keep.

    Integer program over x (expert on device) and y (both ends of a flow on a device), with the products of the slot
    constraints, without which the bound is useless.
    """
    assert trace.affinity is not None
    layers, experts = len(trace.layers), trace.experts[0]
    slots, size = experts // devices, layers * experts * devices
    x = np.arange(size).reshape(layers, experts, devices)
    y = size + np.arange((layers - 1) * experts**2 * devices).reshape(layers - 1, experts, experts, devices)
    rows: list[tuple[dict[int, float], float]] = []
    for i, e in itertools.product(range(layers), range(experts)):
        rows.append((dict.fromkeys(x[i, e].tolist(), 1.0), 1.0))
    for i, g in itertools.product(range(layers), range(devices)):
        rows.append((dict.fromkeys(x[i, :, g].tolist(), 1.0), float(slots)))
    for i, e, g in itertools.product(range(layers - 1), range(experts), range(devices)):
        rows.append((dict.fromkeys(y[i, e, :, g].tolist(), 1.0) | {int(x[i, e, g]): -float(slots)}, 0.0))
        rows.append((dict.fromkeys(y[i, :, e, g].tolist(), 1.0) | {int(x[i + 1, e, g]): -float(slots)}, 0.0))
    total = size + y.size
    table = lil_matrix((len(rows), total))
    for r, (entries, _) in enumerate(rows):
        for column, value in entries.items():
            table[r, column] = value
    pairs = lil_matrix((2 * y.size, total))
    for r, (i, e, after, g) in enumerate(np.ndindex(y.shape)):
        pairs[2 * r, y[i, e, after, g]] = pairs[2 * r + 1, y[i, e, after, g]] = 1
        pairs[2 * r, x[i, e, g]] = pairs[2 * r + 1, x[i + 1, after, g]] = -1
    right = np.array([value for _, value in rows])
    price = np.zeros(total)
    price[size:] = -np.repeat(trace.affinity.reshape(-1), devices)
    solved = milp(
        price,
        constraints=[LinearConstraint(table.tocsr(), right, right), LinearConstraint(pairs.tocsr(), -np.inf, 0)],
        integrality=np.concatenate([np.ones(size), np.zeros(y.size)]),
        bounds=(0, 1),
    )
    assert solved.status == 0, solved.message
    return float(-solved.fun / trace.affinity.sum())


def exact_load(load_SE: np.ndarray, devices: int) -> float:
    """Return the smallest sum over levels of the busiest of equally full devices, by integer programming."""
    levels, experts = load_SE.shape
    x, total = np.arange(experts * devices).reshape(experts, devices), experts * devices + levels
    table = lil_matrix((experts + devices, total))
    for e in range(experts):
        table[e, x[e]] = 1
    for g in range(devices):
        table[experts + g, x[:, g]] = 1
    right = np.array([1.0] * experts + [experts / devices] * devices)
    busiest = lil_matrix((levels * devices, total))
    for s, g in itertools.product(range(levels), range(devices)):
        busiest[s * devices + g, x[:, g]] = load_SE[s]
        busiest[s * devices + g, experts * devices + s] = -1
    solved = milp(
        np.concatenate([np.zeros(experts * devices), np.ones(levels)]),
        constraints=[LinearConstraint(table.tocsr(), right, right), LinearConstraint(busiest.tocsr(), -np.inf, 0)],
        integrality=np.concatenate([np.ones(experts * devices), np.zeros(levels)]),
        bounds=(0, np.concatenate([np.ones(experts * devices), np.full(levels, np.inf)])),
    )
    assert solved.status == 0, solved.message
    return float(solved.fun)

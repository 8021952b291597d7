"""The ways of tokens to their experts and back, as nodes.

Legend: G ranks, K slots per token, r parts of the tokens, S slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from moefx.parallel import memory, packed, steps
from moefx.parallel.divided import slots_of
from moefx.parallel.writer import COMBINE, GROUP, RegionWriter
from moefx.passes.schedule import COMM

Weights = dict[Node, Node]


def _sizes(w: RegionWriter, offsets: list[Node], per_rank: list[int], bounds: Node | None) -> tuple[Node, Node]:
    """Write the exchange of counts; return what arrived, and the splits of all parts."""
    mine = per_rank[w.rank.number] * w.chunks
    counts = w.call(steps.counts_of, offsets, role="count")
    leaving, coming = [n * w.chunks for n in per_rank], [mine] * w.ranks
    flight = w.sent("count", 0, counts, leaving, coming, **w.latency())
    arrived = w.arrived("count", 0, flight)
    return arrived, w.call(steps.splits_of, offsets, arrived, bounds, role="count")


def by_slot(w: RegionWriter, weights: Weights) -> Node:
    """Write: a row for each chosen expert travels there and back."""
    per_rank, region = w.roster.slots_per_rank, w.region
    xs, slots, gates = (w.parts(n) for n in (region.x, w.slots(), region.gates))
    sorts = [w.call(GROUP, s, sum(per_rank), chunk=c) for c, s in enumerate(slots)]
    orders, offsets = [w.item(s, 0) for s in sorts], [w.item(s, 1) for s in sorts]
    arrived, sizes = _sizes(w, offsets, per_rank, w.bounds)
    flights = []
    for c, (x, order) in enumerate(zip(xs, orders, strict=True)):
        leaving, coming = w.item(sizes, 0, c), w.item(sizes, 1, c)
        rows = w.call(steps.leaving_rows, x, order, w.k, leaving, chunk=c)
        flights.append(w.sent("dispatch", c, rows, leaving, coming, **w.exchange_cost()))
    returns = []
    for c, flight in enumerate(flights):
        rows = w.arrived("dispatch", c, flight)
        ids = w.call(steps.local_slots, arrived, w.ranks, w.chunks, c, flight[2], chunk=c)
        done, order = w.experts(weights, rows, ids, 1, c)
        done = w.call(steps.in_order_of_arrival, done, order, role="expert", chunk=c)
        returns.append(w.sent("combine", c, done, flight[2], flight[1], **w.exchange_cost(back=True)))
    sums = []
    for c, (flight, order, part) in enumerate(zip(returns, orders, gates, strict=True)):
        back = w.arrived("combine", c, flight)
        sums.append(w.call(steps.at_home, back, order, part, role="combine", chunk=c))
    return w.joined(sums)


def once(w: RegionWriter, weights: Weights) -> Node:
    """Write: a token travels to each rank once, with its slots and gates there, and one sum comes back."""
    region = w.region
    xs, slots, gates = (w.parts(n) for n in (region.x, w.slots(), region.gates))
    pairs = [w.call(steps.pairs_of, s, w.bounds, chunk=c) for c, s in enumerate(slots)]
    _, sizes = _sizes(w, [w.item(p, 2) for p in pairs], [1] * w.ranks, None)
    flights = []
    for c, (x, gate, pair) in enumerate(zip(xs, gates, pairs, strict=True)):
        leaving, coming, token = w.item(sizes, 0, c), w.item(sizes, 1, c), w.item(pair, 0)
        rows = w.call(torch.index_select, x, 0, token, chunk=c)
        g = w.call(steps.gates_of, gate, token, w.item(pair, 1), chunk=c)
        sent = [(rows, w.exchange_cost()), (w.item(pair, 1), w.latency()), (g, w.latency())]
        flights.append([w.sent("dispatch", c, what, leaving, coming, **price) for what, price in sent])
    returns = []
    for c, three in enumerate(flights):
        rows, ids, gate = (w.arrived("dispatch", c, one) for one in three)
        done, order = w.experts(weights, rows, w.call(steps.as_ids, ids, chunk=c), w.k, c)
        summed = w.call(COMBINE, done, order, gate, role="expert", chunk=c)
        _, leaving, coming = three[0]
        returns.append(w.sent("combine", c, summed, coming, leaving, **w.exchange_cost(back=True)))
    sums = []
    for c, (flight, pair, x) in enumerate(zip(returns, pairs, xs, strict=True)):
        back = w.arrived("combine", c, flight)
        sums.append(w.call(steps.sum_by_rank, back, w.item(pair, 0), flight[2], x, role="combine", chunk=c))
    return w.joined(sums)


def capacity(w: RegionWriter, weights: Weights) -> Node:
    """Write: messages of fixed sizes; what does not fit follows in a second exchange, which all ranks make or none."""
    return _packed(w, weights, w.slots())


def first(w: RegionWriter, weights: Weights) -> Node:
    """Write: as by slot, and the way of rows is kept for the next steps."""
    y = by_slot(w, weights)
    slots, sort, sizes = (w.first(f) for f in (slots_of, GROUP, steps.splits_of))
    leaving, coming, ids = w.item(sizes, 0, 0), w.item(sizes, 1, 0), w.first(steps.local_slots)
    way = slots, w.region.gates, w.item(sort, 0), leaving, coming, ids
    w.call(memory.keep, w.memory, *way, role="stale_out")
    w.call(memory.remember_output, w.memory, y, None, role="stale_out")
    return y


def delta(w: RegionWriter, weights: Weights) -> Node:
    """Write: rows go where they went; those whose choice changed go where they belong in a second message."""
    kept, slots = w.call(memory.recall, w.memory, w.region.x, role="stale_in"), w.slots()
    back = _as_kept(w, weights, kept)
    moved = w.call(memory.changed, kept, slots, sum(w.roster.slots_per_rank))
    stayed = w.call(memory.unchanged_sum, kept, back, slots, w.region.gates, role="combine")
    y = w.call(torch.add, stayed, _packed(w, weights, moved), role="combine")
    return w.joined([y])


def frozen(w: RegionWriter, weights: Weights) -> Node:
    """Write: tokens keep their experts and gates of the kept step; no router, no counts. Not exact."""
    kept = w.call(memory.recall, w.memory, w.region.x, role="stale_in", exact=False)
    back = _as_kept(w, weights, kept)
    return w.joined([w.call(steps.at_home, back, w.item(kept, 2), w.item(kept, 1), role="combine")])


def stale(w: RegionWriter, weights: Weights) -> Node:
    """Write: what the experts made of the tokens a step ago is added now; new rows have until the end. Not exact."""
    before = w.call(memory.previous, w.memory, w.region.x, role="stale_in", exact=False)
    w.call(memory.remember_output, w.memory, by_slot(w, weights), before, role="stale_out", exact=False)
    return w.joined([before])


def _as_kept(w: RegionWriter, weights: Weights, kept: Node) -> Node:
    """Write: rows travel as they did in the kept step."""
    leaving, coming, ids = w.item(kept, 3), w.item(kept, 4), w.item(kept, 5)
    rows = w.call(memory.unchanged_rows, kept, w.region.x)
    arrived = w.arrived("dispatch", 0, w.sent("dispatch", 0, rows, leaving, coming, **w.exchange_cost()))
    done, order = w.experts(weights, arrived, ids, 1, 0)
    done = w.call(steps.in_order_of_arrival, done, order, role="expert")
    return w.arrived("combine", 0, w.sent("combine", 0, done, coming, leaving, **w.exchange_cost(back=True)))


def _packed(w: RegionWriter, weights: Weights, slots: Node) -> Node:
    """Write both exchanges of fixed and of other sizes; return the weighted sums."""
    caps, x, group = w.caps, w.region.x, w.rank.group
    per_rank, mine = w.roster.slots_per_rank, caps[w.rank.number]
    sort = w.call(GROUP, slots, sum(per_rank))
    order, offsets = w.item(sort, 0), w.item(sort, 1)
    counts = w.call(packed.counts_with_flag, offsets, w.bounds, caps, role="count")
    sizes = [n + 1 for n in per_rank], [per_rank[w.rank.number] + 1] * w.ranks
    counting = w.sent("count", 0, counts, *sizes, **w.latency())
    message = w.call(packed.pack, x, order, offsets, w.bounds, caps, w.k)
    flight = w.sent("dispatch", 0, message, caps, [mine] * w.ranks, **w.exchange_cost())
    counted = w.arrived("count", 0, counting)
    ids = w.call(packed.slots_in, counted, w.ranks, mine)
    done, back_order = w.experts(weights, w.arrived("dispatch", 0, flight), ids, 1, 0)
    done = w.call(steps.in_order_of_arrival, done, back_order, role="expert")
    flight = w.sent("combine", 0, done, [mine] * w.ranks, caps, **w.exchange_cost(back=True))
    found = w.call(packed.rest_sizes, counted, offsets, w.bounds, caps, mine, role="count")
    rest = w.call(memory.note, w.memory, found, role="stale_out")
    more = {"stream": COMM, "collective": True, "begins": True}
    there = w.call(
        packed.launch_rest, rest, x, order, offsets, w.bounds, caps, w.k, group, role="dispatch", chunk=1, **more
    )
    rows = w.call(packed.arrive_rest, rest, there, x, group, role="dispatch", chunk=1, waits=True)
    ids = w.call(packed.rest_slots, rest, counted, w.ranks, mine, chunk=1)
    done, back_order = w.experts(weights, rows, ids, 1, 1, share=0.0)
    done = w.call(steps.in_order_of_arrival, done, back_order, role="expert", chunk=1)
    home = w.call(packed.return_rest, rest, done, group, role="combine", chunk=1, **more)
    rest_back = w.call(packed.returned_rest, rest, home, done, group, role="combine", chunk=1, waits=True)
    back = w.arrived("combine", 0, flight)
    y = w.call(packed.unpack, back, rest_back, order, offsets, w.bounds, caps, w.region.gates, role="combine")
    return w.joined([y])


FROZEN = "frozen"
WAYS: dict[str, Callable[[RegionWriter, Weights], Node]] = {
    "slots": by_slot,
    "once": once,
    "capacity": capacity,
    "first": first,
    "delta": delta,
    FROZEN: frozen,
    "stale": stale,
}

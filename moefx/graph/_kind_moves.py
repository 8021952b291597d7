"""Readers of movement: permutations, slices, items and splits, each with one normal form."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from moefx.graph._kind_base import Op, carries_data, data, number, op, reads, shape
from moefx.graph._kind_spelling import Spelling

if TYPE_CHECKING:
    from moefx.graph import Graph


@reads("permute")
def _read_permute(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    source = call.arg(0, "input", call.kwargs.get("self"))
    sizes = shape(source)
    if sizes is None:
        return Op("other", call.name, data(node, graph))
    dims = list(range(len(sizes)))
    if call.name == "permute":
        given = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], list | tuple) else call.args[1:]
        given = given or call.kwargs.get("dims", ())
        dims = [number(d) % len(sizes) for d in given]
    elif call.name == "movedim":
        dims = _moved(len(sizes), call.arg(1, "source"), call.arg(2, "destination"))
    elif call.name == "transpose":
        a, b = number(call.arg(1, "dim0")) % len(sizes), number(call.arg(2, "dim1")) % len(sizes)
        dims[a], dims[b] = dims[b], dims[a]
    elif call.name in ("mT", "mH", "adjoint", "matrix_H"):
        dims[-2], dims[-1] = dims[-1], dims[-2]
    else:
        dims.reverse()
    return Op("permute", call.name, (source,), attrs={"dims": tuple(dims)})


def _moved(rank: int, source: Any, destination: Any) -> list[int]:
    sources = [s % rank for s in ([source] if isinstance(source, int) else source)]
    targets = [t % rank for t in ([destination] if isinstance(destination, int) else destination)]
    order = [d for d in range(rank) if d not in sources]
    for target, start in sorted(zip(targets, sources, strict=True)):
        order.insert(target, start)
    return order


@reads("slice")
def _read_slice(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    source = call.arg(0, "input", call.kwargs.get("self"))
    if not isinstance(source, Node) or not carries_data(source):
        return Op("size", call.name)
    sizes = shape(source)
    if call.name == "getitem":
        if sizes is None:
            return _read_item(node, source, number(call.args[1]), graph)
        index = basic_index(call.args[1], len(sizes))
    elif sizes is None:
        index = None
    else:
        dim = number(call.arg(1, "dim", 0)) % len(sizes)
        index = _along(dim, len(sizes), _dim_index(call))
    if index is None:
        return Op("gather", call.name, data(node, graph))
    return Op("slice", call.name, (source,), attrs={"index": index})


def _dim_index(call: Spelling) -> int | slice:
    if call.name == "select":
        return int(number(call.arg(2, "index")))
    if call.name == "narrow":
        start = number(call.arg(2, "start"))
        return slice(start, start + number(call.arg(3, "length")), 1)
    return slice(number(call.arg(2, "start")), number(call.arg(3, "end")), number(call.arg(4, "step", 1)))


def _along(dim: int, rank: int, item: int | slice) -> tuple[Any, ...]:
    return tuple(item if d == dim else slice(None) for d in range(rank))


def basic_index(given: Any, rank: int) -> tuple[Any, ...] | None:
    """Expand a basic index to one entry per dimension (``None`` adds one); anything else is a gather."""
    items = list(given) if isinstance(given, tuple | list) else [given]
    made: list[Any] = []
    for item in items:
        plain = number(item)
        if isinstance(plain, slice):
            plain = slice(number(plain.start), number(plain.stop), number(plain.step))
            if any(isinstance(bound, Node) for bound in (plain.start, plain.stop, plain.step)):
                return None
        elif not (plain is None or plain is Ellipsis or (isinstance(plain, int) and not isinstance(plain, bool))):
            return None
        made.append(plain)
    used = sum(item is not None and item is not Ellipsis for item in made)
    fill = [slice(None)] * (rank - used)
    where = next((i for i, item in enumerate(made) if item is Ellipsis), None)
    if where is None:
        return (*made, *fill)
    return (*made[:where], *fill, *made[where + 1 :])


def _read_item(node: Node, source: Node, item: Any, graph: Graph) -> Op:
    """Read one result of a node with several: an item of a split is a slice of what was split."""
    producer = op(source, graph)
    if producer.kind == "split" and isinstance(item, int) and producer.attrs.get("parts"):
        dim, parts = producer.attrs["dim"], producer.attrs["parts"]
        rank = len(shape(producer.inputs[0]) or ())
        index = _along(dim, rank, parts[item])
        return Op("slice", "split", producer.inputs, attrs={"index": index, "of": producer.inputs[0]})
    if item == 0 and producer.kind in ("norm", "sdpa", "identity"):
        return Op("identity", "item", (source,))
    return Op("item", "item", (source,), attrs={"index": item})


@reads("split")
def _read_split(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    source = call.arg(0, "input", call.kwargs.get("self", call.kwargs.get("tensor")))
    sizes = shape(source)
    if sizes is None:
        return Op(kind, call.name, data(node, graph))
    dim = number(call.arg(1 if call.name == "unbind" else 2, "dim", 0)) % len(sizes)
    return Op(kind, call.name, (source,), attrs={"dim": dim, "parts": _parts(call, sizes[dim])})


def _parts(call: Spelling, size: int) -> tuple[Any, ...]:
    if call.name == "unbind":
        return tuple(range(size))
    given: Any = call.arg(
        1,
        "chunks",
        call.kwargs.get("split_size_or_sections", call.kwargs.get("split_sizes", call.kwargs.get("split_size"))),
    )
    given = call.kwargs.get("indices_or_sections", call.kwargs.get("sections", given))
    if isinstance(given, list | tuple):
        numbers = [number(g) for g in given]
        if call.name == "tensor_split":
            bounds = [0, *numbers, size]
            return tuple(slice(a, b, 1) for a, b in itertools.pairwise(bounds))
        lengths = numbers
    elif call.name == "tensor_split":
        count = number(given)
        lengths = [size // count + (i < size % count) for i in range(count)]
    else:
        step = -(-size // number(given)) if "chunk" in call.name else number(given)
        lengths = [min(step, size - start) for start in range(0, size, step)]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return tuple(slice(start, start + length, 1) for start, length in zip(starts, lengths, strict=True))

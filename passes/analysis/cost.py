"""What a graph costs: floating point operations, bytes moved and parameters, per node.

A floating point operation is one multiply or one add of a product (two per multiply-accumulate), as
``torch.utils.flop_counter`` counts; pointwise work is not counted in operations, only in bytes. Counts are exact
integers for the example run; :meth:`Costs.in_batch` gives them as polynomials in the batch size ``B``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from moefx.errors import InputError
from moefx.graph.kinds import MOVES, Op, op, value
from moefx.passes.analysis.flow import Flow

if TYPE_CHECKING:
    from moefx.graph import Graph

B = sympy.Symbol("B", integer=True, positive=True)
_FREE = MOVES - {"identity"} | {"size", "param", "input", "output", "split", "item"}


@dataclass(frozen=True)
class NodeCost:
    """The cost of one node: operations, bytes read and written, parameters first read here."""

    flops: Any
    bytes: Any
    parameters: int = 0

    def __add__(self, other: NodeCost) -> NodeCost:
        return NodeCost(self.flops + other.flops, self.bytes + other.bytes, self.parameters + other.parameters)


_NOTHING = NodeCost(0, 0)


class Costs:
    """The costs of one version of a graph.

    ``nodes`` maps every node to its :class:`NodeCost`; ``flops``, ``bytes`` and ``parameters`` are totals.
    """

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        values = {node: value(node) for node in flow.nodes}
        first = _first_readers(flow)
        self.nodes = {n: _node_cost(flow, n, values, first.get(n, 0)) for n in flow.nodes}
        self._in_batch: Costs | None = None

    @property
    def total(self) -> NodeCost:
        """The sum over all nodes."""
        return self.of(self.nodes)

    @property
    def flops(self) -> Any:
        """Total floating point operations."""
        return self.total.flops

    @property
    def bytes(self) -> Any:
        """Total bytes moved if no two nodes are fused."""
        return self.total.bytes

    @property
    def parameters(self) -> int:
        """Total number of parameters that the graph reads."""
        return self.total.parameters

    def of(self, nodes: Iterable[Node]) -> NodeCost:
        """Return the summed cost of some nodes, such as the nodes of a site."""
        return sum((self.nodes[n] for n in nodes if n in self.nodes), _NOTHING)

    def in_batch(self) -> Costs:
        """Return these costs as polynomials in the batch size ``B``.

        The graph is propagated on fake values at three batch sizes and the counts are interpolated; every rule is a
        polynomial of degree at most two in the batch, so this is exact.

        Raises:
            InputError: the graph has no input with a batch, or was captured for one batch size only.
        """
        if self._in_batch is None:
            self._in_batch = _interpolated(self)
        return self._in_batch


def cost(graph: Graph) -> Costs:
    """Return what ``graph`` costs in its example run."""
    return Costs(Flow(graph))


# -- rules -------------------------------------------------------------------------------------------------------------


def _node_cost(flow: Flow, node: Node, values: dict[Node, Any], parameters: int) -> NodeCost:
    what = flow.ops[node]
    flops = _flops(flow.graph, node, what, values)
    return NodeCost(flops, _bytes(flow.graph, node, what, values), parameters)


def _routed_flops(node: Node, name: str, values: dict[Node, Any]) -> int:
    """Return the operations of a dialect operator; of routed heads all count, since gates are values."""
    first = values[node.all_input_nodes[0]]
    if name == "moefx.grouped_linear.default":
        return int(2 * values[node].numel() * first.shape[-1])
    if name == "moefx.head_attention.default":
        return int(4 * first.numel() * values[node.all_input_nodes[1]].shape[1])
    return int(2 * first.numel()) if name in ("moefx.combine.default", "moefx.scatter.default") else 0


def _flops(graph: Graph, node: Node, what: Op, values: dict[Node, Any]) -> int:
    out = values[node]
    if what.kind == "mha" and "heads" in what.attrs:
        return _mha_flops(what, values)
    if what.kind == "sdpa":
        q, k, v = (values[n].shape for n in what.inputs[:3])
        return int(2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1]))
    if what.kind == "routed":
        return _routed_flops(node, what.name, values)
    if not isinstance(out, torch.Tensor):
        return 0
    if what.kind == "linear":
        return 0 if _absorbed(graph, node) else 2 * out.numel() * int(values[what.inputs[0]].shape[-1])
    if what.kind == "conv" and "weight" in what.params:
        weight = graph.parameter(what.params["weight"].fqn)
        return 2 * out.numel() * weight.numel() // weight.shape[0]
    if what.name.startswith("conv_transpose") or _is_transposed(graph, node):
        kernel = _transposed_weight(graph, node)
        return 0 if kernel is None else 2 * int(values[what.inputs[0]].numel()) * kernel.numel() // kernel.shape[0]
    return _matmul_flops(what, values, out) if what.kind == "matmul" else 0


def _absorbed(graph: Graph, node: Node) -> bool:
    """Whether ``node`` is a product whose bias is added by its only user, which is then the linear."""
    users = list(node.users)
    return len(users) == 1 and op(users[0], graph).kind == "linear" and op(users[0], graph).inputs != (node,)


def _matmul_flops(what: Op, values: dict[Node, Any], out: torch.Tensor) -> int:
    if what.name == "einsum":
        terms = what.attrs["equation"].partition("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, operand in zip(terms, what.inputs, strict=False):
            letters = term.replace("...", "")
            shape = values[operand].shape[-len(letters) :] if letters else ()
            sizes |= dict(zip(letters, map(int, shape), strict=False))
        return 2 * math.prod(sizes.values()) if len(what.inputs) == 2 else 0
    return 2 * out.numel() * int(values[what.inputs[0]].shape[-1]) if what.inputs else 0


def _mha_flops(what: Op, values: dict[Node, Any]) -> int:
    q, k, v = (values[n] for n in what.inputs[:3])
    width = what.attrs["width"]
    tokens_dim = 1 if what.attrs["batch_first"] else 0
    projections = 2 * width * (q.numel() + k.numel() + v.numel() + q.numel() // q.shape[-1] * width)
    return int(projections + 4 * (q.numel() // q.shape[-1]) * k.shape[tokens_dim if k.ndim == 3 else 0] * width)


def _is_transposed(graph: Graph, node: Node) -> bool:
    found = graph.root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return isinstance(found, torch.nn.modules.conv._ConvTransposeNd)


def _transposed_weight(graph: Graph, node: Node) -> torch.Tensor | None:
    if node.op == "call_module":
        return graph.root.get_submodule(str(node.target)).get_parameter("weight")
    found = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return value(found) if isinstance(found, Node) else None


def _bytes(graph: Graph, node: Node, what: Op, values: dict[Node, Any]) -> int:
    """Count what is read and written; views and casts that change nothing are free."""
    out = values[node]
    if what.kind in _FREE or not _tensors(out):
        return 0
    reads = [t for n in what.inputs for t in _tensors(values[n])]
    if what.kind == "identity" and reads and _tensors(out)[0].dtype == reads[0].dtype and what.name != "clone":
        return 0
    weights = [graph.parameter(p.fqn) for p in what.params.values()]
    return sum(t.numel() * t.element_size() for t in (*reads, *_tensors(out), *weights))


def _tensors(found: Any) -> list[torch.Tensor]:
    items = found if isinstance(found, tuple | list) else [found]
    return [t for t in items if isinstance(t, torch.Tensor)]


def _first_readers(flow: Flow) -> dict[Node, int]:
    """Return how many parameters each node is the first to read; a shared parameter counts once."""
    found: dict[Node, int] = {}
    seen: set[int] = set()
    for node in flow.nodes:
        names = [p.fqn for p in flow.ops[node].params.values()]
        if node.op == "get_attr":
            names.append(str(node.target))
        elif node.op == "placeholder" and node.meta.get("moefx_param"):
            names.append(node.meta["moefx_param"])
        if node.op == "call_module":
            module = flow.graph.root.get_submodule(str(node.target))
            names = [f"{node.target}.{name}" for name, _ in module.named_parameters()]
        for name in names:
            tensor = flow.graph.parameter(name)
            if isinstance(tensor, torch.nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                found[node] = found.get(node, 0) + tensor.numel()
    return found


# -- symbolic in the batch ---------------------------------------------------------------------------------------------


def _interpolated(costs: Costs) -> Costs:
    flow = costs.flow
    batch = _batch(flow)
    samples = {batch: costs.nodes}
    for size in (batch + 1, batch + 3):
        values = propagated(flow, batch, size)
        samples[size] = {n: _node_cost(flow, n, values, costs.nodes[n].parameters) for n in flow.nodes}
    made = Costs.__new__(Costs)
    made.flow, made._in_batch = flow, made
    made.nodes = {
        node: NodeCost(
            _polynomial({size: found[node].flops for size, found in samples.items()}),
            _polynomial({size: found[node].bytes for size, found in samples.items()}),
            costs.nodes[node].parameters,
        )
        for node in flow.nodes
    }
    return made


def _polynomial(points: dict[int, int]) -> Any:
    if len(set(points.values())) == 1:
        return sympy.Integer(next(iter(points.values())))
    return sympy.interpolate(list(points.items()), B)


def _batch(flow: Flow) -> int:
    sizes = [value(n).shape[0] for n in flow.placeholders if isinstance(value(n), torch.Tensor) and value(n).ndim > 1]
    if not sizes:
        raise InputError("count costs per batch size", found="no input with a batch", do="use the concrete costs")
    return int(max(set(sizes), key=sizes.count))


def propagated(flow: Flow, batch: int, size: int, wanted: Iterable[Node] | None = None) -> dict[Node, Any]:
    """Return fake values of all nodes with every leading batch dimension changed from ``batch`` to ``size``.

    Args:
        flow: of the graph.
        batch: samples of the example run.
        size: samples to count with.
        wanted: nodes that matter; what they do not depend on is left out. None for all.

    Raises:
        InputError: the graph does not run at that size.
    """
    needed = set(flow.nodes) if wanted is None else _behind(flow, wanted)
    values: dict[Node, Any] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            for node in flow.nodes:
                if node.op == "output" or node not in needed:
                    values[node] = None
                elif node.op == "placeholder":
                    values[node] = _resized(flow, node, batch, size)
                else:
                    values[node] = flow.graph.run_node(node, values)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            "count costs per batch size",
            found=f"the graph does not run at batch {size}: {reason}",
            do="use the concrete costs, or capture the model without fixing its batch",
        ) from error
    return values


def _behind(flow: Flow, wanted: Iterable[Node]) -> set[Node]:
    """Return the nodes and all that they are made of, sizes and writes in place included."""
    seen: set[Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [*node.all_input_nodes, *flow.writes(node)]
    return seen


def _resized(flow: Flow, node: Node, batch: int, size: int) -> torch.Tensor | Any:
    name = node.meta.get("moefx_param")
    example = flow.graph.parameter(name) if name else value(node)
    if not isinstance(example, torch.Tensor):
        return example
    shape = list(example.shape)
    if not name and shape and shape[0] == batch:
        shape[0] = size
    return torch.empty(shape, dtype=example.dtype, device=example.device)

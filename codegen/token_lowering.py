"""Find tokens that are taken out of a sequence or put back, and say which kernel computes what stands around it.

A *gather* is ``index_select`` of a flat sequence that a norm reads: kernel and region end with the sums and products
behind the norm. A *scatter* is ``index_copy`` into a flat sequence: its kernel begins with the sums and products that
make the rows. Both are found by data flow alone, so it does not matter whose block it is.

Shapes: T tokens of all samples, R of them taken, B samples, C = R / B, D columns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.kernels import TokenGatherSpec, TokenProgram, TokenScatterSpec
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.spec import ITEM_BYTES, Kernel, require_dtype
from moefx.codegen.tail import IN_PLACE, VIEWS, called, same

Value = Callable[[Any], torch.Tensor]
_RESHAPES = VIEWS | {"flatten", "unflatten", "contiguous"}
_CASTS = frozenset({"to", "float", "half", "bfloat16", "type_as", "_to_copy"})
_POINTWISE = frozenset({"add", "sub", "mul", "div", "truediv", "neg", "addcmul", "lerp", "tanh", "sigmoid"})
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}
_MODULES = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}


@dataclass(frozen=True)
class TokenLowering:
    """Nodes around a gather or a scatter, and the kernel that computes them."""

    name: str
    spec: TokenGatherSpec | TokenScatterSpec
    nodes: tuple[fx.Node, ...]
    #: Nodes, and dotted names of parameters that a norm's module holds.
    inputs: tuple[fx.Node | str, ...]
    output: fx.Node
    #: The views of the gathered tokens that others read too, the gather first.
    kept: tuple[fx.Node, ...] = ()
    #: The view that gave the gathered tokens the shape of the result.
    view: fx.Node | None = None
    what: ClassVar[str] = "gather or scatter of tokens"

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The kernel of the forward pass."""
        return (self.spec,)

    @property
    def training_kernels(self) -> tuple[Kernel, ...]:
        """The kernels of both passes."""
        from moefx.codegen.tokens import backward_kernels

        return (self.spec, *backward_kernels(self.spec))

    def replace(self, module: fx.GraphModule) -> None:
        """Put a call of the kernel in the place of the nodes."""
        from moefx.codegen.tokens import register

        graph = module.graph
        with graph.inserting_before(self.output):
            inputs = [graph.get_attr(one) if isinstance(one, str) else one for one in self.inputs]
            name = "token_gather" if isinstance(self.spec, TokenGatherSpec) else "token_scatter"
            call = getattr(torch.ops.moefx, name).default
            found = made = graph.call_function(call, (inputs, register(self.spec)))
            if isinstance(self.spec, TokenGatherSpec):
                found = graph.call_function(operator.getitem, (made, 0))
                found = self._viewed(graph, found)
                self._keep(graph, made)
        found.meta = dict(self.output.meta)
        self.output.replace_all_uses_with(found)
        for node in reversed(self.nodes):
            if not node.users:
                graph.erase_node(node)

    def _viewed(self, graph: fx.Graph, found: fx.Node) -> fx.Node:
        view = self.view
        if view is None:
            return found
        return graph.create_node(view.op, view.target, (found, *view.args[1:]), dict(view.kwargs))

    def _keep(self, graph: fx.Graph, made: fx.Node) -> None:
        """Let those who read the gathered tokens read them from the kernel, behind it."""
        if not self.kept:
            return
        gather, *views = self.kept
        rows = graph.call_function(operator.getitem, (made, 1))
        rows.meta = dict(gather.meta)
        gather.replace_all_uses_with(rows)
        for before, view in zip([rows, *views], views, strict=False):
            before.append(view)


def is_tokens(node: fx.Node, value: Value) -> bool:
    """Whether a node takes rows out of [T, D] by an index [R], or puts such rows back."""
    if called(node) not in ("index_select", "index_copy"):
        return False
    x, dim, index = _arguments(node, ("input", "dim", "index"))
    if dim != 0 or not isinstance(x, fx.Node) or not isinstance(index, fx.Node):
        return False
    tokens = value(x)
    # A table of parameters is no sequence.
    is_computed = x.op in ("call_method", "call_function")
    return is_computed and tokens.dim() == 2 and tokens.is_floating_point() and value(index).dim() == 1


def lower_tokens(name: str, node: fx.Node, value: Value, root: nn.Module) -> TokenLowering:
    """Return the kernel around a gather or a scatter, or raise :class:`CannotLower`."""
    return _gather(name, node, value, root) if called(node) == "index_select" else _scatter(name, node, value)


def _arguments(node: fx.Node, names: Iterable[str]) -> list[Any]:
    """Return arguments by name, which may come by place."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@dataclass
class _Joined:
    """What joins rows, by kind, in the order in which it was met."""

    value: Value
    kinds: dict[fx.Node | str, str] = field(default_factory=dict)

    def add(self, node: fx.Node, shape: Any) -> bool:
        """Add an operand of a value of ``shape``; return whether it has a kind, and has had no other before."""
        kind = _kind(self.value(node), shape)
        return kind is not None and self.kinds.setdefault(node, kind) == kind


def _kind(operand: torch.Tensor, shape: Any) -> str | None:
    """Return how an operand is spread over values [..., D]: by row, sample, column or token."""
    if _dtype(operand) not in ITEM_BYTES:
        return None
    if same(operand.shape, shape):
        return "row"
    ones = [i for i, size in enumerate(operand.shape) if statically_known_true(size == 1)]
    if operand.dim() == len(shape) and ones == [len(shape) - 1] and same(operand.shape[:-1], shape[:-1]):
        return "token"
    if operand.dim() == 0 or not same(operand.shape[-1:], shape[-1:]):
        return None
    if all(i in ones for i in range(operand.dim() - 1)):
        return "column"
    return "sample" if operand.dim() == len(shape) == 3 and 1 in ones and same(operand.shape[:1], shape[:1]) else None


def _program(
    nodes: Iterable[fx.Node], known: list[Any], width: int, scaled: tuple[bool, bool] = (False, False)
) -> Pointwise:
    """Return ``nodes`` as a program of ``known``: ``z0`` first, then operands.

    ``scaled`` says whether ``z0`` is multiplied by ``z1``, and whether the next operand is added, before all else.
    """
    nodes, last = list(nodes), known[0]

    def run(*z: torch.Tensor) -> torch.Tensor:
        env: dict[Any, Any] = dict(zip(known, z, strict=True))
        if scaled[0]:
            env[last] = env[last] * z[1]
        if scaled[1]:
            env[last] = env[last] + z[1 + scaled[0]]
        for node in nodes:
            if called(node) in _RESHAPES | _CASTS:
                env[node] = env[node.args[0]]
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            env[node] = function(*args, **kwargs)
        result: torch.Tensor = env[nodes[-1] if nodes else last]
        return result

    return trace_pointwise(run, width, len(known))


def _gather(name: str, node: fx.Node, value: Value, root: nn.Module) -> TokenLowering:
    x, _, index = _arguments(node, ("input", "dim", "index"))
    tokens = value(x)
    require_dtype(_dtype(tokens))
    width = int(tokens.shape[1])
    path, norm = _norm_behind(node, value, root)
    kind, weight, bias, eps = _read_norm(norm, value, root, width)
    joined = _Joined(value, dict.fromkeys((one for one in (weight, bias) if one is not None), "column"))
    chain = _chain_behind(norm, joined)
    end = chain[-1] if chain else norm
    _check_order(node, end)
    program = _program(chain, [norm, *joined.kinds], width, (weight is not None, bias is not None))
    position = {one: i for i, one in enumerate(node.graph.nodes)}
    others = [[user for user in one.users if user not in path and user is not norm] for one in path]
    # Who reads the tokens before the region ends goes on reading them from the gather.
    keeps = any(others) and all(position[user] > position[end] for users in others for user in users)
    kept = path[: 1 + max(i for i, users in enumerate(others) if users)] if keeps else []
    made = TokenProgram(width, _dtype(tokens), program, tuple(joined.kinds.values()), kind, eps, _dtype(value(end)))
    views = [one for one in path[1:] if called(one) not in _CASTS]
    return TokenLowering(
        name,
        TokenGatherSpec(made, keeps),
        (*path, norm, *chain),
        (x, index, *joined.kinds),
        end,
        tuple(kept),
        views[-1] if views else None,
    )


def _norm_behind(node: fx.Node, value: Value, root: nn.Module) -> tuple[list[fx.Node], fx.Node]:
    """Return the gather and the views and casts of it that lead to a norm, and the norm."""
    pending = [[node]]
    while pending:
        path = pending.pop(0)
        for user in path[-1].users:
            if not user.args or user.args[0] is not path[-1]:
                continue
            if _norm_kind(user, root):
                return path, user
            if called(user) in _RESHAPES | _CASTS and same(value(user).shape[-1:], value(node).shape[-1:]):
                pending.append([*path, user])
    raise CannotLower("lower a gather of tokens", found="no norm reads its tokens, and a copy needs no kernel")


def _norm_kind(node: fx.Node, root: nn.Module) -> str:
    if node.op == "call_module":
        return _MODULES.get(type(root.get_submodule(str(node.target))), "")
    return _NORMS.get(called(node), "")


def _read_norm(norm: fx.Node, value: Value, root: nn.Module, width: int) -> tuple[str, Any, Any, float]:
    """Return the kind of a norm, its weight and bias (nodes, names of parameters, or ``None``) and its epsilon."""
    kind = _norm_kind(norm, root)
    weight: Any
    bias: Any
    if norm.op == "call_module":
        module: Any = root.get_submodule(str(norm.target))
        shape, eps = module.normalized_shape, module.eps
        held = [getattr(module, key, None) is not None for key in ("weight", "bias")]
        weight, bias = (
            f"{norm.target}.{key}" if has else None for key, has in zip(("weight", "bias"), held, strict=True)
        )
    elif kind == "layer":
        shape, weight, bias, eps = _arguments(norm, ("input", "normalized_shape", "weight", "bias", "eps"))[1:]
        eps = 1e-5 if eps is None else eps
    else:
        shape, weight, eps = _arguments(norm, ("input", "normalized_shape", "weight", "eps"))[1:]
        bias = None
    if isinstance(eps, fx.Node):  # a number that the tracer keeps open; reading it holds it to its value
        eps = eps.meta.get("example_value", eps.meta.get("val"))
    if eps is None and value(norm.args[0]).dtype == torch.float32:
        eps = torch.finfo(torch.float32).eps
    if eps is None or len(shape) != 1 or not statically_known_true(shape[0] == width):
        raise CannotLower("lower a gather of tokens", found=f"{norm.name} has no epsilon, or spans more than a row")
    return kind, weight, bias, float(eps)


def _chain_behind(norm: fx.Node, joined: _Joined) -> list[fx.Node]:
    """Return the sums and products behind a norm, each the only reader of the one before."""
    chain: list[fx.Node] = []
    node = norm
    while len(node.users) == 1:
        (user,) = node.users
        shape = joined.value(node).shape
        if called(user) not in _POINTWISE | _CASTS or not same(joined.value(user).shape, shape):
            break
        if called(user) in _CASTS and (user.args[0] is not node or _dtype(joined.value(user)) not in ITEM_BYTES):
            break
        before = dict(joined.kinds)
        others = [] if called(user) in _CASTS else [one for one in user.all_input_nodes if one is not node]
        if not all(joined.add(one, shape) for one in others):
            joined.kinds = before
            break
        chain.append(user)
        node = user
    return chain


def _scatter(name: str, node: fx.Node, value: Value) -> TokenLowering:
    x, _, index, source = _arguments(node, ("input", "dim", "index", "source"))
    tokens = value(x)
    require_dtype(_dtype(tokens))
    nodes, joined = _made(node, source, value)
    rows = [one for one, kind in joined.kinds.items() if kind == "row" and value(one).dtype == tokens.dtype]
    if not rows or not any(called(one) in _POINTWISE for one in nodes):
        raise CannotLower(
            "lower a scatter of tokens", found="no sum or product makes its rows, and a copy needs no kernel"
        )
    _check_order(nodes[0], node)
    row = rows[-1]
    del joined.kinds[row]
    width = int(tokens.shape[1])
    program = _program(nodes, [row, *joined.kinds], width)
    made = TokenProgram(width, _dtype(tokens), program, tuple(joined.kinds.values()))
    return TokenLowering(name, TokenScatterSpec(made), (*nodes, node), (x, index, row, *joined.kinds), node)


def _made(scatter: fx.Node, source: fx.Node, value: Value) -> tuple[list[fx.Node], _Joined]:
    """Return the nodes that make the rows and are read by nobody else, in order, and what they read.

    Walked from the last to the first, so that all readers of a node are known before it is looked at.
    """
    position = {one: i for i, one in enumerate(scatter.graph.nodes)}
    joined, inside = _Joined(value), {scatter}
    pending = {source: value(source).shape}
    while pending:
        node = max(pending, key=position.__getitem__)
        shape = pending.pop(node)
        free = all(user in inside for user in node.users) and same(value(node).shape, shape)
        reads = _reads(node, value) if free else None
        if reads is not None and all(_fits(one, at, pending, value) for one, at in reads.items()):
            inside.add(node)
            pending |= reads
        elif not joined.add(node, shape):
            raise CannotLower("lower a scatter of tokens", found=f"{node.name} joins its rows in a way of its own")
    order = sorted(inside - {scatter}, key=position.__getitem__)
    joined.kinds = dict(sorted(joined.kinds.items(), key=lambda item: position[item[0]]))
    return order, joined


def _fits(node: fx.Node, shape: Any, pending: dict[fx.Node, Any], value: Value) -> bool:
    """Whether a node can be read as spread over ``shape``, and nobody inside reads it in another way."""
    return same(pending[node], shape) if node in pending else _kind(value(node), shape) is not None


def _check_order(first: fx.Node, last: fx.Node) -> None:
    """Refuse a region in whose midst something is overwritten: its kernel would read the new value."""
    node = first.next
    while node is not last:
        name = called(node)
        if name.endswith("_") or name in IN_PLACE or node.kwargs.get("inplace"):
            raise CannotLower("lower tokens", found=f"{node.name} overwrites a value in the midst of the region")
        node = node.next


def _reads(node: fx.Node, value: Value) -> dict[fx.Node, Any] | None:
    """Return what a sum, product, view or cast reads, with the shape that it is spread over; ``None`` for others."""
    name, out = called(node), value(node)
    if not node.all_input_nodes or _dtype(out) not in ITEM_BYTES:
        return None
    if name in _RESHAPES | _CASTS:
        read = node.all_input_nodes[0]
        whole = same(value(read).shape[-1:], out.shape[-1:]) and _dtype(value(read)) in ITEM_BYTES
        return {read: value(read).shape} if whole and node.args[0] is read else None
    return dict.fromkeys(node.all_input_nodes, out.shape) if name in _POINTWISE else None

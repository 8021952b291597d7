"""Read nodes of a graph as steps of a row program (`moefx.codegen.rows`).

Pointwise nodes are traced one by one, so every pointwise function is known.  What does not depend on the logits is an
operand if it has their shape, or one row per sample, one row, or one number.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from moefx.codegen.calls import is_data
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.pointwise import Arg, Builder, Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.tail import called, same

Value = Callable[[Any], torch.Tensor]
#: Most operands of one router.
_OPERANDS = 6
_SHAPED = frozenset({"view", "reshape", "expand", "expand_as", "view_as", "contiguous", "clone"})
_CASTS = frozenset({"to", "float", "_to_copy", "type_as"})
_WIDTH = 8
#: Calls that read of a tensor no more than its shape: noise, and room for it.
SHAPED_LIKE = frozenset({"empty_like", "rand_like", "randn_like"})


class RowReader:
    """Rows of the linear map ``root``, step by step; ``flat`` is a view of them as [T, E]."""

    def __init__(
        self, root: fx.Node, value: Value, module: nn.Module | None = None, flat: fx.Node | None = None
    ) -> None:
        self.root, self.value = root, value
        self.shape = value(flat or root).shape
        #: How operands are spread over the rows; a bias that a leaf module holds goes by its name.
        self.operands: dict[fx.Node | str, str] = {}
        self.b = Builder(1 + _OPERANDS)
        self.env: dict[fx.Node, Arg] = {}
        self.kinds: dict[fx.Node, str] = {}
        self.dependent = _downstream(root)
        self.index: fx.Node | None = None
        self.slots = 0
        bias = root.args[2] if len(root.args) > 2 else root.kwargs.get("bias")
        self.give(root, "z0", "wide")
        if isinstance(bias, fx.Node):
            self.give(root, self.b.step("add", "z0", self.operand(bias)), "wide")
        elif module is not None and getattr(module, "bias", None) is not None:
            self.operands[f"{root.target}.bias"] = "column"
            self.give(root, self.b.step("add", "z0", "z1"), "wide")
        if flat is not None:
            self.give(flat, self.env[root], "wide")

    def give(self, node: fx.Node, value: Arg, kind: str) -> None:
        """Say what a node is."""
        self.env[node], self.kinds[node] = value, kind

    def kind(self, node: fx.Node) -> str:
        """Return the kind of what was read of a node."""
        return self.kinds[node]

    def take_choice(self, index: fx.Node, k: int) -> None:
        """Let values be picked by ``index``."""
        self.index, self.slots = index, k

    def read(self, node: fx.Node) -> Arg:
        """Return the value of a node, reading what it is made of first."""
        if node not in self.env:
            if node not in self.dependent:
                return self.operand(node)
            for source in node.all_input_nodes:
                if source in self.dependent and source is not self.index:
                    self.read(source)
            self.step(node)
        return self.env[node]

    def read_on(self) -> None:
        """Read whatever follows from what was read, as far as it can be read."""
        for node in self.root.graph.nodes:
            if node not in self.dependent or node in self.env or node is self.index:
                continue
            sources = [s for s in node.all_input_nodes if s in self.dependent]
            if all(s in self.env or s is self.index for s in sources):
                try:
                    self.step(node)
                except CannotLower:
                    continue  # whoever computes it reads what leaves the kernel

    def needed(self, scores: fx.Node) -> list[fx.Node]:
        """Return, in order, what the scores and the gates are made of; the rest stays outside."""
        self.leave_truths()
        wanted: set[fx.Node] = {scores, *(n for n, kind in self.kinds.items() if kind == "slot")}
        for node in reversed(self.root.graph.nodes):
            if node in wanted:
                wanted.update(s for s in node.all_input_nodes if s in self.env)
        for node in [n for n in self.env if n not in wanted]:
            del self.env[node]
        return [node for node in self.root.graph.nodes if node in self.env]

    def leave_truths(self) -> None:
        """Leave truth values that others read to them: only numbers leave a kernel."""
        for node in reversed(self.root.graph.nodes):
            is_truth = node in self.env and self.value(node).dtype == torch.bool
            if is_truth and any(is_data(user) and user not in self.env for user in node.users):
                del self.env[node], self.kinds[node]

    def operand(self, node: fx.Node) -> Arg:
        """Return a tensor that enters from outside."""
        if node not in self.operands:
            if len(self.operands) == _OPERANDS:
                raise CannotLower("lower a router", found=f"more than {_OPERANDS} tensors join its logits")
            self.operands[node] = self.spread(node)
        return f"z{list(self.operands).index(node) + 1}"

    def spread(self, node: fx.Node) -> str:
        """Return how an operand is spread over the logits."""
        found = self.value(node)
        if found.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.bool):
            raise CannotLower("lower a router", found=f"{node.name} of {found.dtype} joins its logits")
        shape, last = found.shape, self.shape[-1]
        if same(shape, self.shape):
            return "row"
        if same(shape, (1,) * found.dim()):
            return "scalar"
        inner = all(same((size,), (1,)) for size in shape[1:-1])
        if same(shape[-1:], (last,)) and inner:
            if found.dim() == 1 or same(shape[:1], (1,)):
                return "column"
            if found.dim() == len(self.shape) > 2 and same(shape[:1], self.shape[:1]):
                return "sample"
        raise CannotLower("lower a router", found=f"{node.name} of shape {tuple(shape)} joins its logits")

    # -- one node ------------------------------------------------------------------------------------------------------

    def step(self, node: fx.Node) -> None:
        """Read one node whose sources are known."""
        name = called(node)
        made = node.meta.get("val", node.meta.get("example_value"))
        if not isinstance(made, torch.Tensor) or not name:
            raise self.refuse(node, "it is no operator on rows")
        if name == "detach":
            source = node.all_input_nodes[0]
            self.give(node, self.b.step("stop", self.read(source)), self.kinds[source])
        elif name in _SHAPED or name in _CASTS:
            self.keep(node, made)
        elif name in ("softmax", "log_softmax", "_softmax"):
            self.softmax(node, name == "log_softmax")
        elif name in ("sum", "mean", "logsumexp", "amax"):
            self.reduce(node, name)
        elif name == "gather":
            self.pick(node, node.args[0], node.args[2] if len(node.args) > 2 else node.kwargs.get("index"))
        elif name == "getitem":
            self.pick(node, node.args[0], node.args[1])
        else:
            self.pointwise(node)

    @staticmethod
    def refuse(node: fx.Node, why: str) -> CannotLower:
        return CannotLower("lower a router", found=f"{node.name} ({called(node) or node.op}): {why}")

    def source(self, node: fx.Node) -> tuple[Arg, str]:
        """Return the value and kind of what a node reads first."""
        first = node.args[0]
        if not isinstance(first, fx.Node) or first is self.index:
            raise self.refuse(node, "it computes with the numbers of experts")
        return self.read(first), self.kinds.get(first, "wide")

    def keep(self, node: fx.Node, made: torch.Tensor) -> None:
        """Read a cast to float32, or a view of equal shape."""
        found, kind = self.source(node)
        before = self.value(node.args[0])
        if made.dtype not in (before.dtype, torch.float32) or not same(made.shape, before.shape):
            raise self.refuse(node, "it changes shape or precision")
        self.give(node, found, kind)

    def softmax(self, node: fx.Node, log: bool) -> None:
        found, kind = self.source(node)
        if not last_axis(node, 1, self.value) or kind == "one":
            raise self.refuse(node, "it runs along another axis")
        shifted, powers, total = self.exponentials(found, kind)
        value = self.b.step("sub", shifted, self.b.step("log", total)) if log else self.b.step("div", powers, total)
        self.give(node, value, kind)

    def exponentials(self, found: Arg, kind: str) -> tuple[Arg, Arg, Arg]:
        """Return ``x - max``, its exponentials and their sum."""
        of = "chosen" if kind == "slot" else "row"
        shifted = self.b.step("sub", found, self.b.step(f"{of}_max", found))
        powers = self.b.step("exp", shifted)
        return shifted, powers, self.b.step(f"{of}_sum", powers)

    def is_stopped(self, node: fx.Node) -> bool:
        """Whether no gradient passes through a node, since all it is made of was detached or has none."""
        if called(node) == "detach":
            return True
        if node not in self.dependent:
            return not self.value(node).requires_grad
        sources = [one for one in node.all_input_nodes if is_data(one) and one is not self.index]
        return node is not self.root and bool(sources) and all(map(self.is_stopped, sources))

    def reduce(self, node: fx.Node, name: str) -> None:
        """Read a sum, mean, maximum or logarithm of summed exponentials along the last axis, which stays."""
        found, kind = self.source(node)
        keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
        if not keep or not last_axis(node, 1, self.value) or kind == "one":
            raise self.refuse(node, "it does not run along the last axis and keep it")
        if name == "logsumexp":
            _, _, total = self.exponentials(found, kind)
            # The gradient of the maximum, which is left out, would cancel between the two.
            top = self.b.step("chosen_max" if kind == "slot" else "row_max", found)
            self.give(node, self.b.step("add", self.b.step("log", total), top), "one")
            return
        if name == "amax" and not self.is_stopped(node):
            raise self.refuse(node, "a maximum passes on no gradient in a kernel")
        most = "max" if name == "amax" else "sum"
        value = self.b.step(f"chosen_{most}" if kind == "slot" else f"row_{most}", found)
        if name == "mean":
            value = self.b.step("div", value, float(self.slots if kind == "slot" else int(self.shape[-1])))
        self.give(node, value, "one")

    def pick(self, node: fx.Node, source: Any, index: Any) -> None:
        """Read values of the chosen experts."""
        if called(node) == "getitem" and not isinstance(index, fx.Node):
            raise self.refuse(node, "it cuts rows")
        if index is not self.index or index is None or not isinstance(source, fx.Node):
            raise self.refuse(node, "it picks by something else than the choice")
        named = called(node)
        if named == "gather" and not last_axis(node, 1, self.value):
            raise self.refuse(node, "it picks along another axis")
        if named == "getitem" and self.value(source).dim() != 1:
            raise self.refuse(node, "it picks along another axis")
        self.give(node, self.b.step("pick", self.read(source)), "slot")

    def pointwise(self, node: fx.Node) -> None:
        """Read a pointwise operator, traced by itself."""
        if called(node).endswith("_") and not called(node).startswith("_"):
            raise self.refuse(node, "it works in place")
        tensors = list(dict.fromkeys(node.all_input_nodes))
        if self.index in tensors:
            raise self.refuse(node, "it computes with the numbers of experts")
        values = [self.read(t) for t in tensors]
        truths = tuple(self.value(t).dtype == torch.bool for t in tensors)
        try:
            program = _traced(node, tuple(tensors), truths)
        except CannotLower as error:
            raise self.refuse(node, error.found) from error
        if program.inputs > max(1, len(tensors)):
            raise self.refuse(node, "it splits rows")
        names: dict[Arg, Arg] = {f"z{i}": v for i, v in enumerate(values)}
        for one in program.steps:
            args = [names[a] if isinstance(a, str) else a for a in one.args]
            # A truth value is asked whether it is not zero; one that was computed here is a truth value already.
            known = one.op == "ne" and args[1] == 0.0 and self.b.is_bool(args[0])
            names[one.name] = args[0] if known else self.b.step(one.op, *args)
        result = names[program.result] if isinstance(program.result, str) else program.result
        self.give(node, result, self.joined(node, tensors))

    def joined(self, node: fx.Node, tensors: list[fx.Node]) -> str:
        """Return the kind of what values together make, after checking their shapes."""
        kinds = {self.kinds.get(t, "wide") for t in tensors if self.operands.get(t) != "scalar"}
        if {"slot", "wide"} <= kinds:
            raise self.refuse(node, "it joins chosen and all experts")
        kind = next((k for k in ("slot", "wide") if k in kinds), "one")
        last = {"slot": self.slots, "wide": self.shape[-1], "one": 1}[kind]
        if not same(self.value(node).shape, (*self.shape[:-1], last)):
            raise self.refuse(node, "it changes the shape")
        return kind


def last_axis(node: fx.Node, position: int, value: Value) -> bool:
    """Whether the ``dim`` of a call, the argument at ``position``, is the last axis."""
    default = -1 if called(node) in ("sort", "topk") else None
    dim = node.kwargs.get("dim", node.args[position] if len(node.args) > position else default)
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, value(node.args[0]).dim() - 1)


def _downstream(root: fx.Node) -> set[fx.Node]:
    """Return what depends on the values of a node, and the node; its dtype and a tensor of its shape do not."""
    found = {root}
    for node in root.graph.nodes:
        reads = is_data(node) and called(node) not in SHAPED_LIKE
        if reads and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _traced(node: fx.Node, tensors: tuple[fx.Node, ...], truths: tuple[bool, ...]) -> Pointwise:
    """Return one node as a program of its tensors, of which some hold truth values."""
    places: dict[fx.Node, Any] = {t: _Place(i, truths[i]) for i, t in enumerate(tensors)}
    args = fx.node.map_arg(node.args, places.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, places.__getitem__)
    try:
        return _trace(node.target, args, tuple(sorted(kwargs.items())), max(1, len(tensors)))
    except TypeError as error:  # an argument that cannot be hashed
        raise CannotLower("read a pointwise node", found=f"{node.name} with arguments {node.args}") from error


@dataclass(frozen=True)
class _Place:
    """The position of a tensor among those of a call, and whether it holds truth values."""

    at: int
    is_truth: bool = False


@functools.lru_cache(maxsize=4096)
def _trace(target: Any, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], inputs: int) -> Pointwise:
    def run(*z: torch.Tensor) -> torch.Tensor:
        def filled(value: Any) -> Any:
            if not isinstance(value, _Place):
                return value
            return z[value.at] != 0 if value.is_truth else z[value.at]

        function = getattr(torch.Tensor, target) if isinstance(target, str) else target
        result: torch.Tensor = function(*map(filled, args), **{key: filled(value) for key, value in kwargs})
        return result

    return trace_pointwise(run, _WIDTH, inputs)

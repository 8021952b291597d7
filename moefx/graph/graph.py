"""The captured graph: an ``fx.Graph`` over the user's own module, with its guards and its provenance."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from moefx.errors import GuardError
from moefx.graph.guards import Guard
from moefx.graph.origin import ModuleCall, origin_of, show_source
from moefx.graph.outputs import put_together
from moefx.graph.patches import Written
from moefx.graph.signature import CallSpec


class Graph:
    """A model as one graph whose leaves are ``torch.nn`` modules and whose parameters are the model's own.

    Attributes:
        root: the traced module; never changed, never copied.
        fx: the nodes. ``meta["val"]`` holds shapes and dtypes, ``meta["moefx"]`` the node's origin.
        guards: facts under which the graph equals the model, in program order; checked when the graph runs.
        calls: the module invocations that the trace went through, innermost first.
        constants: tensors that the model holds outside its parameters and buffers.
        reads_mode: whether the trace asked the root, not its children, if it is in train or in eval mode.
    """

    def __init__(
        self,
        root: nn.Module,
        fx: FxGraph,
        *,
        call_spec: CallSpec | None = None,
        out_spec: pytree.TreeSpec | None = None,
        guards: Iterable[Guard] = (),
        calls: Iterable[ModuleCall] = (),
        constants: dict[str, torch.Tensor] | None = None,
        notes: Iterable[str] = (),
        written: Iterable[Written] = (),
        reads_mode: bool = False,
    ) -> None:
        self.root, self.fx = root, fx
        self.call_spec, self.out_spec = call_spec, out_spec
        self.guards, self.calls = list(guards), list(calls)
        self.constants = dict(constants or {})
        self.notes = list(notes)
        self.written = list(written)
        self.reads_mode = reads_mode
        self.modes = {path: root.get_submodule(path).training for path in ["", *(call.path for call in self.calls)]}
        self.version = 0
        self.facts: dict[str, Any] = {}

    @property
    def nodes(self) -> list[Node]:
        """All nodes in program order."""
        return list(self.fx.nodes)

    @property
    def output_node(self) -> Node:
        """The node that returns."""
        output: Node = next(node for node in reversed(self.fx.nodes) if node.op == "output")
        return output

    @property
    def signature(self) -> Any:
        """The signature of the traced forward."""
        return self.call_spec.signature if self.call_spec else None

    def touch(self) -> None:
        """Say that the graph changed: cached analyses are dropped."""
        self.version += 1
        self.facts.clear()

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter, buffer or constant by its dotted name."""
        if name in self.constants:
            return self.constants[name]
        value: Any = self.root
        for part in name.split("."):
            value = getattr(value, part)
        assert isinstance(value, torch.Tensor), name
        return value

    def call_named(self, name: str) -> ModuleCall | None:
        """Return the module invocation called ``name`` (``path`` or ``path#index``)."""
        return next((call for call in self.calls if call.name == name), None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph like the model's forward.

        Raises:
            InputError: an argument is missing or unknown.
            GuardError: the call lies outside what was captured.
        """
        env = self._execute(args, kwargs, ())
        (output,) = (n for n in reversed(self.fx.nodes) if n.op == "output")
        leaves = map_arg(output.args[0], lambda n: env[n])
        return put_together(list(leaves), self.out_spec) if self.out_spec is not None else leaves

    def values(self, nodes: Iterable[Node], *args: Any, **kwargs: Any) -> dict[Node, Any]:
        """Run the graph and return the values of ``nodes``."""
        wanted = tuple(nodes)
        env = self._execute(args, kwargs, wanted)
        return {node: env[node] for node in wanted}

    def _execute(self, args: tuple[Any, ...], kwargs: dict[str, Any], keep: tuple[Node, ...]) -> dict[Node, Any]:
        assert self.call_spec is not None, "this graph was built without a signature"
        self._check_state()
        inputs = self.call_spec.tensors_of(args, kwargs)
        guards = {guard.node: guard for guard in self.guards}
        last_use = self._last_uses()
        env: dict[Node, Any] = {}
        rest = iter(inputs)
        for node in self.fx.nodes:
            if node.op == "output":
                break
            env[node] = next(rest) if node.op == "placeholder" else self._guarded(node, env)
            if node in guards:
                guards[node].check(env[node])
            for done in last_use.get(node, ()):
                if done not in keep:
                    del env[done]
        return env

    def _check_state(self) -> None:
        for path, training in self.modes.items():
            module = self.root.get_submodule(path)
            if module.training != training:
                now, then = ("eval", "train") if training else ("train", "eval")
                raise GuardError(
                    f"run the graph captured from {type(self.root).__name__}",
                    found=f"{path or 'the model'} is in {now} mode, the graph was captured in {then} mode",
                    do="switch the mode back, or trace again",
                )
        for attribute in self.written:
            attribute.check()

    def _guarded(self, node: Node, env: dict[Node, Any]) -> Any:
        """Run one node; what it refuses to compute lies outside what was captured."""
        try:
            return self.run_node(node, env)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise GuardError(
                f"run the graph captured from {type(self.root).__name__}",
                found=f"{what} at {show_source(origin_of(node).source)}",
                do="pass inputs on which the model itself runs, or trace it again with inputs like these",
            ) from error

    def run_node(self, node: Node, env: dict[Node, Any]) -> Any:
        """Compute one node from the values of its inputs."""
        args, kwargs = map_arg(node.args, lambda n: env[n]), map_arg(node.kwargs, lambda n: env[n])
        if node.op == "get_attr":
            return self.parameter(str(node.target))
        with _context(node):
            if node.op == "call_module":
                return self.root.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def copy(self) -> Graph:
        """Return the same graph over the same module, with nodes of its own."""
        fx, swap = FxGraph(), dict[Node, Node]()
        for node in self.fx.nodes:
            swap[node] = fx.node_copy(node, lambda n: swap[n])

        def swapped(tree: Any) -> Any:
            return pytree.tree_map(lambda leaf: swap.get(leaf, leaf) if isinstance(leaf, Node) else leaf, tree)

        calls = [
            ModuleCall(c.path, c.index, c.type_name, *map(swapped, (c.args, c.kwargs, c.output, c.nodes)))
            for c in self.calls
        ]
        guards = [replace(guard, node=swap[guard.node]) for guard in self.guards]
        return Graph(
            self.root,
            fx,
            call_spec=self.call_spec,
            out_spec=self.out_spec,
            guards=guards,
            calls=calls,
            constants=self.constants,
            notes=self.notes,
            written=self.written,
            reads_mode=self.reads_mode,
        )

    def _last_uses(self) -> dict[Node, list[Node]]:
        last: dict[Node, Node] = {}
        for node in self.fx.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        uses: dict[Node, list[Node]] = {}
        for used, user in last.items():
            if user.op != "output":
                uses.setdefault(user, []).append(used)
        return uses

    def prune(self) -> None:
        """Remove reads of sizes, tuple items and parameters that nothing uses; anything that computes stays."""
        guarded = {guard.node for guard in self.guards}
        for node in reversed(list(self.fx.nodes)):
            if not node.users and node not in guarded and _is_read(node):
                self.fx.erase_node(node)
        self.calls = [replace(c, nodes=tuple(n for n in c.nodes if not n._erased)) for c in self.calls]

    @staticmethod
    def from_export(program: Any, root: nn.Module) -> Graph:
        """Read a ``torch.export`` program of ``root``; see :func:`moefx.graph.export.from_export`."""
        from moefx.graph.export import from_export

        return from_export(program, root)

    def __repr__(self) -> str:
        return f"<moefx.Graph of {type(self.root).__name__}: {len(self.fx.nodes)} nodes, {len(self.guards)} guards>"


def _is_read(node: Node) -> bool:
    if node.op == "get_attr" or (node.op == "call_method" and node.target == "size"):
        return True
    if node.op != "call_function":
        return False
    item = node.target is operator.getitem and isinstance(node.args[1], int | str)
    return item or _is_scalar(node)


def _is_scalar(node: Node) -> bool:
    return isinstance(node.meta.get("val"), bool | int | float | str | torch.dtype | torch.device)


@contextlib.contextmanager
def _context(node: Node) -> Iterator[None]:
    """Run a node under the no_grad and autocast blocks it was traced in."""
    context = node.meta.get("context")
    if context is None:
        yield
        return
    grad, autocasts = context
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad and torch.is_grad_enabled()))
        for device, dtype, enabled in autocasts:
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield

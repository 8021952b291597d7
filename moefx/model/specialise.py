"""One static model per sampler step: routers that read the timestep alone are evaluated once, before sampling.

What only a compiler of the whole model can do: the values such routers read are found by data flow and computed without
running the rest; the choice is then a fact, so routers go, chosen experts become one dense network, and what is off is
left out. Steps with the same choice share a model, and all models share their weights.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from moefx.errors import InputError, NothingMatched
from moefx.graph import Graph, trace
from moefx.graph.signature import Inputs
from moefx.model.carry import root_inputs
from moefx.model.local import call_inputs
from moefx.model.sides import model_of, switch_of, variants_by_side
from moefx.model.slice_heads import CannotSlice, slice_heads
from moefx.model.specialised import Promise, Specialised, one_sample, rounded
from moefx.passes.analysis import Facts, analyse
from moefx.passes.analysis.conditioning import TIMESTEP
from moefx.routing.record import RoutingRecord
from moefx.routing.static import ConstantGates, FirstArgument, Foldable


@dataclass(frozen=True)
class _Folding:
    """One routed module that the timestep decides, and the nodes of the deciding arguments."""

    path: str
    module: Any
    arguments: tuple[Node, ...]


@torch.no_grad()
def specialise(
    model: nn.Module, timesteps: Sequence[float] | Tensor, inputs: Inputs = None, *, fixed: Sequence[str] = ()
) -> Specialised:
    """Evaluate every router that reads the timestep alone at each of ``timesteps``, and fold what it chose.

    The model is left as it is. Results equal the routed model's to rounding, at every timestep of the list.

    Args:
        model: a transformed model, in evaluation mode.
        timesteps: those of the sampler, such as ``scheduler.timesteps``, as the model receives them.
        inputs: example inputs, as for :func:`moefx.transform`.
        fixed: names of tensor inputs that every call will pass as ``inputs`` has them, such as the guidance or the
            resolution; routers may read these too. A call with others runs the routed model.

    Raises:
        InputError: no such input, no timesteps, not finite ones, or a model in training mode.
        NothingMatched: no router reads the timestep alone.
        CaptureError: the model cannot be traced.
    """
    times = _times(timesteps)
    if not isinstance(model, nn.Module) or model.training:
        found = "training mode" if isinstance(model, nn.Module) else f"a {type(model).__name__}"
        raise InputError("specialise a model", found=found, do="pass a transformed model, after model.eval()")
    if switch_of(model) is not None:
        return _specialise_sides(model, times, inputs, fixed)
    graph = trace(model, inputs)
    facts = analyse(graph)
    assert graph.call_spec is not None
    source, promise = _timestep_input(graph, facts), Promise(graph.call_spec, fixed)
    foldings, left = _foldings(graph, facts, {source.name, *fixed})
    if not foldings:
        found = "; ".join(f"{path}: {why}" for path, why in left.items()) or "no routed module"
        raise NothingMatched(
            f"specialise {type(model).__name__}",
            found=found,
            do="transform it with a recipe whose router reads the timestep alone (moefx recipes), or name inputs that "
            "never change with fixed=",
        )
    shared: dict[str, dict[Hashable, Any]] = {folding.path: {} for folding in foldings}
    chosen: dict[tuple[Hashable, ...], int] = {}
    variants: list[nn.Module] = []
    variant_of: dict[float, int] = {}
    cutter = _Cutter(graph)
    for time, values in zip(times, _evaluate(graph, source, foldings, times), strict=True):
        folded = [f.module.fold(v, shared[f.path]) for f, v in zip(foldings, values, strict=True)]
        key = tuple(choice for choice, _ in folded)
        if key not in chosen:
            chosen[key] = len(variants)
            parts = {f.path: _called_alike(static) for f, (_, static) in zip(foldings, folded, strict=True)}
            choices = {f.path: choice for f, (choice, _) in zip(foldings, folded, strict=True)}
            variants.append(cutter.cut(_with_parts(model, parts), parts, choices))
        variant_of[time] = chosen[key]
    return Specialised(model, variants, variant_of, left | cutter.left, source.name, promise)


def _specialise_sides(model: nn.Module, times: Sequence[float], inputs: Inputs, fixed: Sequence[str]) -> Specialised:
    """Specialise two whole models behind a boundary: a call runs its timestep's one."""
    found = switch_of(model)
    assert found is not None
    graph = trace(model_of(model, "high"), inputs)
    assert graph.call_spec is not None
    made = variants_by_side(model, times, lambda expert, mine: specialise(expert, mine, inputs, fixed=fixed))
    return Specialised(model, *made, found[1].argument, Promise(graph.call_spec, fixed))


class _Cutter:
    """Cuts heads that are off out of the blocks of variants; a block with the same heads is cut once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.done: dict[Hashable, nn.Module | None] = {}
        self.left: dict[str, str] = {}

    def cut(self, variant: nn.Module, parts: Mapping[str, nn.Module], choices: Mapping[str, Hashable]) -> nn.Module:
        """Return ``variant`` with the heads cut out of every block where that can be done."""
        by_block: dict[str, dict[str, ConstantGates]] = {}
        for path, part in parts.items():
            owner, _, name = path.rpartition(".")
            if isinstance(part, ConstantGates) and len(part.on()) < len(part.values):
                by_block.setdefault(owner, {})[name] = part
        for path, gates in by_block.items():
            key = path, tuple(choice for name, choice in choices.items() if name.startswith(f"{path}."))
            if key not in self.done:
                self.done[key] = self._cut_block(variant.get_submodule(path), path, gates)
            block = self.done[key]
            if block is not None:
                owner, _, name = path.rpartition(".")
                variant.get_submodule(owner)._modules[name] = block
        return variant

    def _cut_block(self, block: nn.Module, path: str, gates: Mapping[str, ConstantGates]) -> nn.Module | None:
        calls = [call for call in self.graph.calls if call.path == path]
        try:
            if path and len(calls) != 1:
                raise CannotSlice(f"its block is called {len(calls)} times")
            inputs = call_inputs(calls[0]) if path else root_inputs(self.graph)
            return slice_heads(block, inputs, gates)
        except CannotSlice as reason:
            self.left[path] = f"heads that are off are masked, not cut out: {reason}"
            return None


def _called_alike(static: nn.Module) -> nn.Module:
    """Return a module that takes the arguments which the routed one took."""
    same = isinstance(static, ConstantGates) or getattr(static, "same_arguments", False)
    return static if same else FirstArgument(static)


def _times(timesteps: Sequence[float] | Tensor) -> list[float]:
    given = timesteps.flatten().tolist() if isinstance(timesteps, Tensor) else list(timesteps)
    times = [rounded(t) for t in given]
    if not times or not all(math.isfinite(t) for t in times):
        raise InputError(
            "specialise a model", found=f"timesteps {times[:5]}", do="pass the sampler's timesteps, at least one"
        )
    return list(dict.fromkeys(times))


def _timestep_input(graph: Graph, facts: Facts) -> Node:
    """Return the one input that carries the timestep."""
    found = [node for node, kind in facts.context.classes.inputs.items() if kind == TIMESTEP]
    if len(found) != 1:
        names = ", ".join(node.name for node in found) or "none"
        raise InputError(
            f"specialise {type(graph.root).__name__}",
            found=f"timestep inputs: {names}",
            do="specialise models with exactly one timestep argument",
        )
    return found[0]


def _foldings(graph: Graph, facts: Facts, given: set[str]) -> tuple[list[_Folding], dict[str, str]]:
    """Return the modules that the ``given`` inputs alone decide, and for the other routed ones why not."""
    folded: dict[str, _Folding] = {}
    left: dict[str, str] = {}
    for node in graph.fx.nodes:
        module: Any = graph.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        path = str(node.target)
        if not isinstance(module, Foldable):
            if module is not None and any(isinstance(part, RoutingRecord) for part in module.modules()):
                left[path] = f"a {type(module).__name__} has no static form"
            continue
        arguments = tuple(node.args[i] for i in module.deciding if i < len(node.args))
        others = sorted(_inputs_behind(facts, arguments) - given)
        if not module.deciding:
            left[path] = "its router reads tokens"
        elif others:
            left[path] = f"its choice depends on {', '.join(others)}"
        elif path in folded:
            left[path] = "it is called more than once"
        else:
            folded[path] = _Folding(path, module, tuple(n for n in arguments if isinstance(n, Node)))
    return [folding for path, folding in folded.items() if path not in left], left


def _inputs_behind(facts: Facts, arguments: Sequence[Any]) -> set[str]:
    """Return the names of the inputs whose data the arguments depend on; their sizes are no data."""
    flow = facts.context.flow
    nodes = [argument for argument in arguments if isinstance(argument, Node)]
    return {p.name for p in flow.placeholders if any(flow.ancestors[flow.index[n]] >> flow.index[p] & 1 for n in nodes)}


def _evaluate(
    graph: Graph, source: Node, foldings: list[_Folding], times: list[float]
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield, per timestep, the deciding values of each module for one sample; nothing else of the model runs."""
    needed = _ancestors([node for folding in foldings for node in folding.arguments])
    assert graph.call_spec is not None
    inputs = [node for node in graph.fx.nodes if node.op == "placeholder"]
    examples = dict(zip(inputs, graph.call_spec.examples, strict=True))
    for time in times:
        env: dict[Node, Any] = {}
        for node in graph.fx.nodes:
            if node in needed:
                at_time = torch.full_like(examples[node], time) if node is source else examples.get(node)
                env[node] = at_time if node.op == "placeholder" else graph.run_node(node, env)
        yield [tuple(one_sample(env[node]) for node in folding.arguments) for folding in foldings]


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _with_parts(model: nn.Module, parts: Mapping[str, nn.Module], path: str = "") -> nn.Module:
    """Return a copy of the module tree that shares every parameter and buffer, with other modules at some paths."""
    if path in parts:
        return parts[path].eval()
    clone = model.__class__.__new__(model.__class__)
    clone.__dict__.update(model.__dict__)
    for kind in ("_parameters", "_buffers"):
        clone.__dict__[kind] = dict(model.__dict__[kind])
    children = model._modules.items()
    clone.__dict__["_modules"] = {
        name: child if child is None else _with_parts(child, parts, f"{path}.{name}".lstrip("."))
        for name, child in children
    }
    return clone

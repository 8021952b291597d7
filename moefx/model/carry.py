"""Planning how values pass from module to module: taps out of sight, and the state of routers.

A module that needs what only a module around it has, or what a layer elsewhere computed, gets it as one more argument.
Every module in between takes the argument and hands it on, so that no hook, global or attribute is involved, and
checkpointing, compilation, export and interleaved calls see an ordinary value.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import Node

from moefx.errors import CaptureError, PlanError
from moefx.graph import Graph, ModuleCall
from moefx.model.captures import Captures
from moefx.model.forward import make_forward
from moefx.model.local import JSON, call_inputs, encode
from moefx.model.plan import CarriedPlan, CarrierPlan, SitePlan, TapPlan
from moefx.model.taps import choose_tap
from moefx.passes.analysis import Facts
from moefx.passes.analysis.site import Site
from moefx.passes.calibration.modality import text_tokens
from moefx.passes.rewrite.base import Pass

# The other taps belong to the block itself.
_FAR = frozenset({"timestep", "condition", "label", "pooled", "text"})
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def root_inputs(graph: Graph) -> JSON:
    """Return how the whole model is called."""
    assert graph.call_spec is not None
    args, kwargs = graph.call_spec.rebuild(graph.call_spec.examples)
    return {"args": [encode(a) for a in args], "kwargs": {k: encode(v) for k, v in kwargs.items()}}


def parent(path: str) -> str:
    """Return the path of the module that holds ``path``."""
    return path.rpartition(".")[0]


def inside(path: str, outer: str) -> bool:
    """Tell whether ``path`` lies below the module ``outer``."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def below(path: str, outer: str) -> str:
    """Return ``path`` as seen from ``outer``, which holds it."""
    return path.removeprefix(f"{outer}.") if outer else path


class Carrying:
    """What one plan passes between modules; asked for while its sites are planned.

    Attributes:
        values: what is passed, and to whom.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph = facts, facts.graph
        self.values: list[CarriedPlan] = []
        self._captured: dict[str, tuple[Graph, JSON]] = {}

    def needed(self, planned: Sequence[SitePlan]) -> tuple[CarriedPlan, ...]:
        """Keep what the sites that were planned in the end ask for, and return it."""
        self.values = list(asked_for(self.values, planned))
        return tuple(self.values)

    @property
    def carriers(self) -> tuple[CarrierPlan, ...]:
        """The modules whose forwards hand the values on, by path."""
        pairs = [(v.source, block) for v in self.values for block in v.blocks]
        paths = {path for source, block in pairs for path in (source, *self._between(source, block))}
        return tuple(CarrierPlan(path=path, inputs=self._capture(path)[1]) for path in sorted(paths))

    def enclosing(self, path: str) -> Iterator[str]:
        """Yield the modules around ``path`` that have a forward of their own, innermost first; the model is ``""``."""
        while path:
            path = parent(path)
            container = isinstance(self.graph.root.get_submodule(path), _CONTAINERS)
            if not path or not (container or not self.calls(path)):
                yield path

    def calls(self, path: str) -> list[ModuleCall]:
        """Return the invocations of a module."""
        return [c for c in self.graph.calls if c.path == path]

    def tap(self, rule: Pass, name: str, block: str) -> TapPlan | None:
        """Return the tap ``name`` for ``block`` from the nearest module around it that sees it; None if there is none.

        Raises:
            CaptureError, PlanError: a module on the way cannot hand it on.
        """
        if name not in _FAR:
            return None
        inner = block
        for source in self.enclosing(block):
            local, _ = self._capture(source)
            call = next(iter(self.calls(source)), None) if source else None
            node = choose_tap(name, self.facts, call, local)
            value: Any = None if node is None else node.meta["val"]
            if node is not None and rule.accepts(name, value) and _precedes(local, node, below(inner, source)):
                width = value.shape[-1] if value.ndim > 1 else 1
                argument = self._argument(name, source, node, block)
                return TapPlan(name=name, node=argument, rank=value.ndim, width=width)
            inner = source
        return None

    def state(self, rule: Pass, sites: Sequence[tuple[Site, SitePlan]]) -> list[SitePlan]:
        """Let each router of one stream know the state of the one before; return the sites, numbered.

        Layers follow each other if they belong to the same stream and see as many tokens: in a U-net those of one
        resolution, in FLUX those of the image, and of the text. Where later layers see the tokens of both, as FLUX's
        single blocks do, their state begins as that of the image and of the text, put together like the tokens.

        Raises:
            PlanError: a module on the way cannot hand it on.
        """
        order = {node: i for i, node in enumerate(self.graph.fx.nodes)}
        lanes: dict[Any, list[tuple[Site, SitePlan]]] = {}
        for site, plan in sorted(sites, key=lambda pair: order[pair[0].output]):
            if plan.calls > 1:
                raise _cannot(rule, f"{plan.name} is called {plan.calls} times in one forward")
            lanes.setdefault((site.role, *_positions(site)), []).append((site, plan))
        made = []
        known: dict[Any, tuple[CarriedPlan, list[tuple[Site, SitePlan]]]] = {}
        for key, lane in lanes.items():
            blocks = tuple(dict.fromkeys(plan.block or "" for _, plan in lane))
            try:
                value = self._lane(blocks, [*_positions(lane[0][0]), rule.state_width])
            except (CaptureError, PlanError) as error:
                raise _cannot(rule, error.found) from error
            value, first = self._merged(value, lane, known, order)
            known[key] = value, lane
            for i, (site, plan) in enumerate(lane, first):
                parameters, active = rule.state_costs(site, i, sum(tap.width for tap in plan.taps if tap.rank > 1))
                after = {
                    "parameters_after": plan.parameters_after + parameters,
                    "active_after": plan.active_after + active,
                }
                layers = first + len(lane)
                made.append(plan.model_copy(update={"state": value.name, "layer": i, "layers": layers, **after}))
        return made

    def _merged(
        self,
        value: CarriedPlan,
        lane: Sequence[tuple[Site, SitePlan]],
        known: Mapping[Any, tuple[CarriedPlan, Sequence[tuple[Site, SitePlan]]]],
        order: Mapping[Node, int],
    ) -> tuple[CarriedPlan, int]:
        """Let a state begin as those of the streams that were merged to its tokens, if they are at hand.

        Returns:
            The state, and how many layers of the main one of these came before.
        """
        site = lane[0][0]
        span = text_tokens(self.facts, site)
        if span is None:
            return value, 0
        batch, total = _positions(site)
        text = span[1] - span[0]
        found = [known.get(key) for key in (("context", batch, text), (site.role, batch, total - text))]
        before = [pair for pair in found if pair is not None]
        late = any(order[s.output] > order[site.output] for _, layers in before for s, _ in layers)
        if len(before) < 2 or late or any(v.source != value.source for v, _ in before):
            return value, 0
        (words, _), (main, layers) = before
        names = (words.name, main.name) if span[0] == 0 else (main.name, words.name)
        begun = value.model_copy(update={"begins": names, "like": main.name})
        self.values[self.values.index(value)] = begun
        return begun, len(layers)

    def _lane(self, blocks: tuple[str, ...], shape: list[int]) -> CarriedPlan:
        """Return a state that passes through ``blocks``, below the smallest module around them all."""
        around = [{block, *self.enclosing(block)} for block in blocks]
        source = max(set.intersection(*around), key=len)
        for block in blocks:
            for path in (source, *self._between(source, block), block):
                if path != block or path == source:
                    self._capture(path)
        name = self._free_name("state", source, [path for b in blocks for path in (*self._between(source, b), b)])
        value = {"tensor": shape, "dtype": "float32"}
        self.values.append(CarriedPlan(name=name, source=source, value=value, blocks=blocks))
        return self.values[-1]

    def _argument(self, tap: str, source: str, node: Node, block: str) -> str:
        """Return the name of the argument that brings ``node`` of ``source`` to ``block``."""
        for i, value in enumerate(self.values):
            if (value.source, value.node) == (source, node.name):
                blocks = (*dict.fromkeys((*value.blocks, block)),)
                self.values[i] = value.model_copy(update={"blocks": blocks})
                return value.name
        between = self._between(source, block)
        for path in between:
            self._capture(path)
        name = self._free_name(tap, source, [*between, block])
        value = encode(node)
        self.values.append(CarriedPlan(name=name, source=source, node=node.name, value=value, blocks=(block,)))
        return name

    def _free_name(self, stem: str, source: str, paths: Sequence[str]) -> str:
        """Return an argument name that no module on the way has, nor a value that may come along the same way."""
        near = {v.name for v in self.values if _nested(v.source, source)}
        for path in paths:
            near |= set(inspect.signature(self.graph.root.get_submodule(path).forward).parameters)
        names = (f"moefx_{stem}" + (f"_{i}" if i else "") for i in itertools.count())
        return next(name for name in names if name not in near)

    def _between(self, source: str, block: str) -> list[str]:
        """Return the modules through which a value of ``source`` passes on its way to ``block``."""
        return [path for path in self.enclosing(block) if inside(path, source)]

    def _capture(self, path: str) -> tuple[Graph, JSON]:
        """Capture a module on the way, and make sure that its forward can be written anew."""
        if path not in self._captured:
            calls = self.calls(path)
            if path and len(calls) != 1:
                found = f"{path!r} is called {len(calls)} times in one forward"
                raise PlanError("pass a value on", found=found, do="skip this site")
            inputs = call_inputs(calls[0]) if path else root_inputs(self.graph)
            try:
                local = Captures.of(self.graph).see(path, inputs)
                make_forward(local)
            except (CaptureError, PlanError) as error:
                where = repr(path) if path else type(self.graph.root).__name__
                raise PlanError(
                    "pass a value on", found=f"the forward of {where} cannot be rewritten: {error.found}", do=error.do
                ) from error
            self._captured[path] = local, inputs
        return self._captured[path]


def _nested(one: str, two: str) -> bool:
    return one == two or inside(one, two) or inside(two, one)


def _precedes(local: Graph, node: Node, child: str) -> bool:
    """Tell whether ``node`` is computed before ``child`` is called."""
    for other in local.fx.nodes:
        if other is node:
            return True
        if other.op == "call_module" and other.target == child:
            return False
    return False


def _positions(site: Site) -> tuple[int, ...]:
    """Return the shape of a site's input without its features."""
    shape = list(site.shapes["x"])
    del shape[int(site.shapes["axis"])]
    return tuple(shape)


def _cannot(rule: Pass, found: str) -> PlanError:
    return PlanError(
        f"hand the state of each router to the next layer's with {rule.name}",
        found=found,
        do="route without memory (state='none'), or leave those layers out with skip=",
    )


def asked_for(values: Sequence[CarriedPlan], sites: Sequence[SitePlan]) -> tuple[CarriedPlan, ...]:
    """Return the values that these sites read, for their blocks alone: a plan may have lost sites since."""
    asked = {(name, s.block or "") for s in sites for name in (s.state, *(tap.node for tap in s.taps))}
    kept = [(v, tuple(b for b in v.blocks if (v.name, b) in asked)) for v in values]
    return tuple(v.model_copy(update={"blocks": blocks}) for v, blocks in kept if blocks)


def described(values: Sequence[CarriedPlan], path: str) -> Mapping[str, JSON]:
    """Return the tensors that the module at ``path`` takes as further arguments, by name."""
    return {v.name: v.value for v in values if passes(v, path)}


def passes(value: CarriedPlan, path: str) -> bool:
    """Tell whether ``value`` enters the module at ``path`` from outside."""
    return inside(path, value.source) and any(path == b or inside(b, path) for b in value.blocks)

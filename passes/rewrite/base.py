"""What a rewriting pass is: typed options, stated facts, a contract, and an edit of one site.

A pass never touches the user's model. It reads a site of a local graph (one module, captured alone), builds ordinary
``nn.Module`` replacements from the dense weights, and says where they go; ``moefx.model`` applies that to the model.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.fx import Node

from moefx.errors import OptionError, nearest
from moefx.graph import Graph
from moefx.passes.analysis.segments import SegmentLayout
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.analysis.tokens import Branch, TokenLayout
from moefx.passes.rewrite.ratios import Ratio, Unit

if TYPE_CHECKING:
    from moefx.passes.analysis import Facts
    from moefx.passes.calibration import Calibration


class Options(BaseModel):
    """Typed options of a pass: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Contract:
    """What a rewrite promises of one site: the relative error of its output against the dense one at step 0.

    ``exact`` allows rounding only; ``approximate`` changes the function, is measured, and refused above ``bound``.
    """

    kind: Literal["exact", "approximate"]
    bound: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a pass made of one site: the routed module, and the children that the rewritten module needs."""

    routed: nn.Module
    children: dict[str, nn.Module | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What an edit may read.

    ``graph`` is the local graph and ``site`` the site in it; ``whole`` says that the captured module is the site, so
    that a replacement module is enough. ``name`` is the site's name in the whole model, ``taps`` the values asked for.
    Where a pass carries state, the site is number ``layer`` of those that hand it on, and ``common`` is one dict for
    all of them: what a pass puts there, such as a recurrent cell, they share.
    """

    graph: Graph
    site: Site
    name: str
    taps: Mapping[str, Node]
    seed: int
    whole: bool
    layer: int = 0
    common: dict[str, Any] = field(default_factory=dict)

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the seed, the site's name and ``purpose`` only."""
        return _generator(self.seed, self.name, purpose)

    def free_name(self, stem: str, taken: Collection[str] = ()) -> str:
        """Return a child name that neither the module nor its rewritten graph uses yet."""
        used = {str(node.target) for node in self.graph.fx.nodes if node.op == "call_module"} | set(taken)
        name, i = stem, 0
        while hasattr(self.graph.root, name) or name in used:
            i += 1
            name = f"{stem}_{i}"
        return name


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """What a pass over whole blocks may read.

    ``graph`` is the block's own graph with the children that matter written out, ``layout`` says where its tokens are;
    it is block number ``layer`` of ``layers``. ``ffn`` captures a child of the block alone: its graph and its one site.
    ``common`` is one dict for all blocks of a transform: what a pass puts there, such as a shared router, they share.
    """

    graph: Graph
    name: str
    layout: TokenLayout
    layer: int
    layers: int
    seed: int
    ffn: Callable[[Branch], tuple[Graph, Site]]
    common: dict[str, Any]
    taps: Mapping[str, Node] = field(default_factory=dict)

    @property
    def stream(self) -> Node:
        """The node that carries the block's tokens ``[B, T, D]`` when they enter."""
        return self.node(self.layout.stream)

    def node(self, name: str) -> Node:
        """Return the node of the block's graph that is called ``name``."""
        found: Node = next(node for node in self.graph.fx.nodes if node.name == name)
        return found

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the seed, the block's name and ``purpose`` only."""
        return _generator(self.seed, self.name, purpose)


class Pass(ABC):
    """Base of all rewriting passes.

    Class attributes:
        name: how it is asked for.
        summary: one line for listings.
        site_kind: which sites it rewrites.
        requires, provides, preserves: facts, from which the order of passes follows.
        Options: its options model.
        unit: what a budget chooses a share of, if it can choose.

    ``calibration`` is what the user measured; a pass may take values from it, never the structure that it builds, since
    a saved model is loaded without.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    site_kind: ClassVar[Kind]
    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    preserves: ClassVar[frozenset[str]] = frozenset()
    Options: ClassVar[type[Options]] = Options
    unit: ClassVar[Unit | None] = None
    calibration: Calibration | None = None

    def __init__(self, **options: Any) -> None:
        self.options = self._validated(options)

    @classmethod
    def _validated(cls, options: dict[str, Any]) -> Any:
        known = cls.Options.model_fields
        for name in options:
            if name not in known:
                raise OptionError(f"use option {name!r} of {cls.name}", found="no such option", do=nearest(name, known))
        try:
            return cls.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "options"
            message = first["msg"].removeprefix("Value error, ")
            raise OptionError(
                f"use {where} = {first['input']!r} in {cls.name}", found=message, do=f"see the options of {cls.name}"
            ) from error

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the values that this pass needs from elsewhere in the model."""
        return ()

    def accepts(self, tap: str, value: torch.Tensor) -> bool:
        """Return whether ``value`` will do for ``tap``; if not, a module further out is searched for a better one."""
        return True

    @property
    def state_width(self) -> int:
        """The width of the state that each replacement takes from the one before as its last argument; 0 for none.

        It returns ``(y, state)``; the first one gets None.
        """
        return 0

    def state_costs(self, site: Site, layer: int, tap_width: int = 0) -> tuple[int, int]:
        """Return the parameters and multiply-adds per token that carrying state adds to `costs`."""
        return 0, 0

    def fitted(self, facts: Facts) -> Self:
        """Return this pass with the options that depend on the traced model filled in; they are part of the plan."""
        return self

    @property
    def needs_calibration(self) -> bool:
        """Whether these options can only be applied with calibration data."""
        return False

    @abstractmethod
    def refusal(self, site: Site) -> str:
        """Return why this pass cannot rewrite ``site``, from shapes alone; ``""`` if it can."""

    @abstractmethod
    def contract(self) -> Contract:
        """Return what the rewrite promises with these options."""

    @abstractmethod
    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return what the rewrite does to the parameters and the compute of ``site``.

        ``tap_width`` is the total width of what the taps yield (0 for a raw timestep).
        """

    def ratios(self, site: Site) -> list[Ratio]:
        """Return what a budget may choose from at this site, the smallest first; nothing if there is no choice."""
        return []

    def kept_first(self, losses: torch.Tensor) -> torch.Tensor:
        """Return what each unit of a site is expected to lose, in the order in which this pass would keep them."""
        return losses.sort(descending=True).values

    def warnings(self) -> list[str]:
        """Return what the user should know about these options."""
        return []


class SitePass(Pass):
    """A pass that rewrites a region inside a module's graph."""

    @abstractmethod
    def edit(self, context: Context) -> Edit:
        """Build the replacement of ``context.site``; may change ``context.graph``, never ``context.graph.root``."""


class BlockPass(Pass):
    """A pass that runs a whole block differently, such as on some of its tokens."""

    def layout_refusal(self, layout: TokenLayout) -> str:
        """Return why a block with this layout cannot be rewritten; ``""`` if it can."""
        return ""

    @property
    def opens_attention(self) -> bool:
        """Whether the block's attention over its own tokens has to be written out in its graph."""
        return False

    def attention_refusal(self, attention: Site) -> str:
        """Return why that attention cannot be rewritten; ``""`` if it can."""
        return ""

    @abstractmethod
    def edit(self, context: BlockContext) -> Edit:
        """Change ``context.graph``, never its root, and return the children that it now needs."""


@dataclass(frozen=True, kw_only=True)
class SegmentContext:
    """What a pass over several blocks may read: the graph of the module that owns them, and where they are in it."""

    graph: Graph
    name: str
    layout: SegmentLayout
    taps: Mapping[str, Node]
    seed: int

    def node(self, name: str) -> Node:
        """Return the node of the graph that is called ``name``."""
        found: Node = next(node for node in self.graph.fx.nodes if node.name == name)
        return found

    def generator(self, purpose: str) -> torch.Generator:
        """Return a generator that depends on the seed, the segment's name and ``purpose`` only."""
        return _generator(self.seed, self.name, purpose)


class SegmentPass(Pass):
    """A pass that acts on several consecutive blocks; its site is the first of them.

    ``by_token`` says that the blocks are run on other tokens than they are called with, so that they must be able to.
    """

    by_token: ClassVar[bool] = True

    @abstractmethod
    def segments(self, layers: int) -> list[range]:
        """Return the blocks of each segment, of a model with so many."""

    def refusal(self, site: Site) -> str:
        """Return why no segment begins with this block."""
        layer, layers = int(site.operands["layer"]), int(site.operands["layers"])
        if site.dead or not site.region_is_module or site.role != "main":
            return "it is not one of the model's main blocks"
        found = next((s for s in self.segments(layers) if layer in s), None)
        if found is None:
            return f"block {layer} of {layers} belongs to no segment"
        return "" if found.start == layer else f"the segment of blocks {found.start} to {found.stop - 1} contains it"

    def layout_refusal(self, layout: SegmentLayout) -> str:
        """Return why a segment with this layout cannot be rewritten; ``""`` if it can."""
        return ""

    @abstractmethod
    def edit(self, context: SegmentContext) -> Edit:
        """Change ``context.graph``, never its root, and return the children that it now needs."""


class CallPass(Pass):
    """A pass that changes when a whole module runs, not what it computes.

    The module gets a child, ``child``, which its forward calls with a function that runs what the forward was.
    """

    child: ClassVar[str]

    @abstractmethod
    def around(self, module: nn.Module) -> nn.Module:
        """Return the child for ``module``; its forward maps ``() -> output`` to an output."""


class ModelPass(CallPass):
    """A `CallPass` around the whole model, whose one site is the model itself.

    The child gets what the forward was and the arguments: it maps ``(forward, args, kwargs)`` to an output.
    """

    site_kind: ClassVar[Kind] = "model"

    def refusal(self, site: Site) -> str:
        """Refuse nothing: a model is no site of the analyses."""
        return ""

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return nothing: what a copy of the model costs is counted in planning."""
        return Costs(0, 0, 0, 0)


def _generator(seed: int, name: str, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{purpose}".encode()))


@dataclass(frozen=True)
class Costs:
    """Parameters and multiply-adds per token of one site, before and after; active counts what one token uses.

    ``saved_fraction`` of the dense cost of the site, or of each block of a segment, is saved on top, where tokens or
    samples skip it.
    """

    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int
    saved_fraction: float = 0.0


_PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Make a pass available by its name."""
    _PASSES[cls.name] = cls
    return cls


def passes() -> dict[str, type[Pass]]:
    """Return all registered passes by name."""
    return dict(sorted(_PASSES.items()))


def get_pass(name: str) -> type[Pass]:
    """Return the pass called ``name``.

    Raises:
        OptionError: there is none; the message names the nearest.
    """
    if name not in _PASSES:
        raise OptionError(f"use pass {name!r}", found="no such pass", do=nearest(name, _PASSES))
    return _PASSES[name]

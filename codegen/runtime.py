"""Run lowered regions: tensors in, emitted kernels launched, tensors out.

Regions appear in graphs as one operator, ``moefx::region(tensors, key)``, opaque to compilers and free of host
synchronisation; ``key`` names the :class:`RegionSpec`, registered in this process by whoever lowered it.

Shapes: T tokens, k slots, R = T * k routed rows, E experts, K input and N output columns of a projection.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Generic, TypeVar

import torch

from moefx.codegen import store, tune
from moefx.codegen.emit import emit, emit_tile_map
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule, load_class, row_tile
from moefx.codegen.spec import CombineSpec, LinearSpec, RegionSpec
from moefx.codegen.targets import Target, target_of

_REGIONS: dict[str, RegionSpec] = {}


def register(region: RegionSpec) -> str:
    """Make a region callable by its key and return the key."""
    _REGIONS[region.key] = region
    return region.key


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    if not triton_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


T = TypeVar("T")


@dataclass(frozen=True)
class Operands(Generic[T]):
    """What a region reads, one entry per projection; or what stands for it, such as positions."""

    x: T
    offsets: T
    order: T | None
    weights: tuple[list[T], ...]
    biases: tuple[list[T], ...]
    gates: T | None
    #: What the combine's tail reads.
    tail: tuple[T, ...] = ()
    #: The sorted row of each pair, and the row tiles, where the grouping gave them.
    position: T | None = None
    tiles: T | None = None

    @classmethod
    def of(cls, region: RegionSpec, tensors: Sequence[T]) -> Operands[T]:
        """Split the inputs of :func:`region_op`."""
        remaining = iter(tensors)
        x, offsets = next(remaining), next(remaining)
        order = next(remaining) if region.reads_order else None
        position, tiles = (next(remaining), next(remaining)) if region.placed else (None, None)
        weights, biases = [], []
        for spec in region.linears:
            weights.append(list(itertools.islice(remaining, spec.weights)))
            biases.append(list(itertools.islice(remaining, spec.weights if spec.bias else 0)))
        gates = next(remaining) if region.combine is not None else None
        return cls(x, offsets, order, tuple(weights), tuple(biases), gates, tuple(remaining), position, tiles)


def row_block(target: Target, load: int) -> int:
    """Return the row tile that all kernels of a region share, hence one tile map."""
    return 32 if target.is_interpreter else row_tile(load)


def schedules(region: RegionSpec, target: Target, rows: int, experts: int) -> tuple[Schedule, ...]:
    """Return the schedules of a region's projections for a load."""
    load = load_class(rows, experts)
    block_m = row_block(target, load)
    return tuple(tune.schedule_for(linear, target, load, experts, block_m) for linear in region.linears)


def sources(region: RegionSpec, target: Target, rows: int, experts: int) -> dict[str, str]:
    """Return the modules that would run a region on a target, by kernel name, in execution order."""
    found = {} if region.placed else {"tile_map": emit_tile_map()}
    for spec, schedule in zip(region.linears, schedules(region, target, rows, experts), strict=True):
        found[spec.name] = emit(spec, schedule)
    if region.combine is not None:
        found[region.combine.name] = emit(region.combine)
    return found


def tile_bound(rows: int, experts: int, block_m: int) -> int:
    """Return how many row tiles ``rows`` rows can need: each of E + 1 groups (one of dropped rows) may end in part."""
    return rows // block_m + min(rows, experts + 1)


def tile_map(offsets: torch.Tensor, rows: int, block_m: int) -> torch.Tensor:
    """Cut ``rows`` sorted rows into tiles of one expert: int32 [3, TILES] of expert, first row, end row; -1 padded."""
    experts = offsets.shape[0] - 1
    tiles = torch.empty((3, tile_bound(rows, experts, block_m)), dtype=torch.int32, device=offsets.device)
    if tiles.numel():
        _tile_map_module().launch(offsets, tiles, rows, block_m)
    return tiles


def tiles_of(buffer: torch.Tensor, rows: int, experts: int, block_m: int) -> torch.Tensor:
    """Return the part of a larger buffer that is the tile map of such rows."""
    count = tile_bound(rows, experts, block_m)
    return buffer[: 3 * count].view(3, count)


def row_tiles(given: Operands[torch.Tensor], rows: int, block_m: int) -> torch.Tensor:
    """Return the row tiles of a region: what its grouping made, else made here."""
    if given.tiles is None:
        return tile_map(given.offsets, rows, block_m)
    return tiles_of(given.tiles, rows, given.offsets.shape[0] - 1, block_m)


@functools.cache
def _tile_map_module() -> ModuleType:
    return store.load(emit_tile_map(), "tile_map")


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose last axis is contiguous."""
    return tensor if tensor.dim() < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


class Projection:
    """One grouped projection, emitted and loaded: calling it launches the kernel."""

    def __init__(self, spec: LinearSpec, schedule: Schedule) -> None:
        self.spec, self.schedule = spec, schedule
        self._module = store.load(emit(spec, schedule), spec.name)
        self._upcast = spec.dtype == "bfloat16" and interpreting()

    def __call__(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor],
        order: torch.Tensor | None,
        tiles: torch.Tensor,
        out: torch.Tensor,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write ``out`` [R, N], and ``kept`` if the spec says so, from ``x``, [T, K] with ``order``, else [R, K]."""
        operands = [rows_of(x), *(t.contiguous() for t in (*weights, *biases))]
        operands += [order] if order is not None else []
        planes, results = self.schedule.partials(self.spec.halves), [out] if kept is None else [out, kept]
        partial = [out.new_empty((planes, *out.shape), dtype=torch.float32)] if planes else []
        if tiles.numel():
            self._module.launch(*operands, tiles, *partial, *results, self._upcast)
        return out


class Combine:
    """One combine kernel, emitted and loaded: calling it launches the kernel."""

    def __init__(self, spec: CombineSpec) -> None:
        self.spec = spec
        self._module = store.load(emit(spec), spec.name)

    def __call__(
        self,
        rows: torch.Tensor,
        order: torch.Tensor,
        weights: torch.Tensor | None,
        tail: Sequence[torch.Tensor] = (),
        position: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum [T, D] of routed rows [R, D] over slots, weighted and with a tail if the spec says so.

        Without ``position`` the order is inverted first.
        """
        out = rows.new_empty((order.shape[0] // self.spec.top_k, self.spec.features))
        gates = [] if weights is None else [weights.to(torch.float32).contiguous()]
        flat = [t.reshape(-1, self.spec.features).contiguous() for t in tail]
        if out.numel():
            inverted = (order, torch.empty_like(order)) if position is None else (None, position)
            self._module.launch(rows, *inverted, *gates, *flat, out, *([] if kept is None else [kept]))
        return out


class LoadedRegion:
    """The kernels of a region for one target and load class."""

    def __init__(self, region: RegionSpec, target: Target, rows: int, experts: int) -> None:
        self.region = region
        chosen = schedules(region, target, rows, experts)
        self.block_m = chosen[0].block_m
        self.projections = [Projection(spec, schedule) for spec, schedule in zip(region.linears, chosen, strict=True)]
        self.combine = Combine(region.combine) if region.combine else None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the region; ``tensors`` as :func:`region_op` takes them. Return its result and what it saved."""
        given = Operands.of(self.region, tensors)
        x, order = given.x, given.order
        rows = order.shape[0] if order is not None else x.shape[0]
        tiles = row_tiles(given, rows, self.block_m)
        saved = []
        for i, (projection, saves) in enumerate(zip(self.projections, self.region.saves, strict=True)):
            spec = projection.spec
            kept = x.new_empty((rows, spec.out_features * spec.halves)) if spec.keep else None
            out = x.new_empty((rows, spec.out_features))
            gathered = order if spec.gather else None
            x = projection(x, given.weights[i], given.biases[i], gathered, tiles, out, kept)
            saved += [x if kept is None else kept] if saves else []
        if self.combine is not None and order is not None:
            ends = self.combine.spec
            kept = x.new_empty((order.shape[0] // ends.top_k, ends.features)) if ends.keep else None
            x = self.combine(x, order, given.gates, given.tail, given.position, kept)
            saved += [] if kept is None else [kept]
        return x, saved


@functools.lru_cache(maxsize=1024)
def _loaded(key: str, target: Target, load: int, experts: int) -> LoadedRegion:
    return LoadedRegion(region_of(key), target, load * experts, experts)


def clear() -> None:
    """Forget the regions and kernels of this process; files stay."""
    _REGIONS.clear()
    _loaded.cache_clear()
    _tile_map_module.cache_clear()
    tune.clear()
    store.clear()


@torch.library.custom_op("moefx::region", mutates_args=())
def region_op(tensors: Sequence[torch.Tensor], key: str) -> torch.Tensor:
    """Run the region ``key`` on x, offsets, order if read, each projection's weights and biases, gates if read."""
    x, offsets = tensors[0], tensors[1]
    experts = offsets.shape[0] - 1
    rows = routed_rows(region_of(key), tensors)
    return _loaded(key, target_of(x.device), load_class(rows, experts), experts)(tensors)[0]


@region_op.register_fake
def _(tensors: Sequence[torch.Tensor], key: str) -> torch.Tensor:
    return fake_result(region_of(key), tensors)


def fake_result(region: RegionSpec, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return an empty result of a region."""
    x = tensors[0]
    if region.combine is not None:
        gates = tensors[-1 - len(region.combine.operands)]
        return x.new_empty((gates.shape[0], region.combine.features))
    return x.new_empty((routed_rows(region, tensors), region.linears[-1].out_features))


def routed_rows(region: RegionSpec, tensors: Sequence[torch.Tensor]) -> int:
    """Return R."""
    return tensors[2].shape[0] if region.reads_order else tensors[0].shape[0]


def region_of(key: str) -> RegionSpec:
    """Return the region of a key."""
    if key not in _REGIONS:
        raise CannotLower(
            f"run the lowered region {key}",
            found="a graph compiled in another process",
            do="compile the model again with torch.compile(model, backend='moefx')",
        )
    return _REGIONS[key]

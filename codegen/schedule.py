"""How a kernel is tiled: an analytic choice, no measurement, the same for the same spec, target and load.

The model of §2.9 of the kernel notes as one sympy expression: the grid runs in waves over the processors, a wave costs
the products of one tile, and small tiles reach a smaller share of the peak.  ``explain`` prints it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy

from moefx.codegen.spec import ITEM_BYTES, CombineSpec, LinearSpec
from moefx.codegen.targets import Target


@dataclass(frozen=True, order=True)
class Schedule:
    """Tile sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    #: "pointer": rows gathered by address, one program per tile; "tma": tiles loaded by descriptors, ``programs`` walk.
    variant: str = "pointer"
    programs: int = 0
    flatten: bool = False
    warp_specialize: bool = False
    descriptor_gather: bool = False

    def describe(self) -> str:
        """Return the schedule in one line."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        text = f"tile {tile}, {self.num_warps} warps, {self.num_stages} stages, groups of {self.group_m} row tiles"
        if self.variant == "pointer":
            return text
        return f"{text}, {self.programs} programs{', divided warps' if self.warp_specialize else ''}"


#: Share of the peak that a tile of (rows, columns) reaches; a prior, to be calibrated on a device.
EFFICIENCY = {
    (128, 256): 1.0,
    (128, 128): 0.9,
    (64, 256): 0.85,
    (64, 128): 0.75,
    (128, 64): 0.7,
    (64, 64): 0.55,
    (32, 256): 0.4,
    (32, 128): 0.35,
    (16, 256): 0.25,
    (16, 128): 0.2,
}
_COLUMNS = (256, 128, 64, 32, 16)


def efficiency(rows: int, columns: int) -> float:
    """Return the share of the peak that a tile reaches; below the table it falls with the tile's area."""
    return EFFICIENCY.get((rows, columns), 0.55 * min(1.0, rows * columns / 4096) * (1.0 if rows >= 64 else 0.5))


@functools.cache
def cost_expression() -> sympy.Expr:
    """Return the cost of a grouped projection in units of tile products, symbolic in sizes, tile and processors."""
    load, experts, n, k, bm, bn, processors, efficiency = sympy.symbols("load E N K BM BN P eff", positive=True)
    tiles = experts * sympy.ceiling(load / bm) * sympy.ceiling(n / bn)
    return sympy.ceiling(tiles / processors) * bm * bn * k / efficiency


@functools.cache
def _cost() -> Callable[..., Any]:
    names = sympy.symbols("load E N K BM BN P eff", positive=True)
    compiled: Callable[..., Any] = sympy.lambdify(names, cost_expression(), modules="math")
    return compiled


def load_class(rows: int, experts: int) -> int:
    """Return rows per expert rounded up to a power of two, from 16 to 4096: what a schedule may depend on.

    The number of tokens itself is no part of the choice, so a new batch size does not mean a new kernel.
    """
    mean = max(1, -(-rows // max(1, experts)))
    return int(min(4096, max(16, 1 << (mean - 1).bit_length())))


def row_tile(load: int) -> int:
    """Return the row tile for a load class: below 64 rows the tensor cores' wide instructions do not apply anyway."""
    return 32 if load == 32 else 16 if load <= 16 else 64 if load <= 64 else 128


def _candidates(spec: LinearSpec, target: Target, block_m: int) -> Iterator[Schedule]:
    item = ITEM_BYTES[spec.dtype]
    block_k = min(128 // item, max(16, _power_of_two(spec.in_features)))
    for columns in _COLUMNS:
        accumulators = block_m * columns * spec.halves
        if columns > max(16, _power_of_two(spec.out_features)):
            continue
        if accumulators > _accumulator_limit(spec, target, columns):
            continue
        stage_bytes = (block_m + columns * spec.halves) * block_k * item
        stages = min(target.max_stages, target.shared_limit_bytes // stage_bytes, -(-spec.in_features // block_k) + 1)
        if stages >= 1:
            warps = 8 if accumulators >= _accumulator_limit(spec, target, columns) or accumulators >= 128 * 128 else 4
            yield Schedule(block_m, columns, block_k, warps, max(1, stages), 8)


def _accumulator_limit(spec: LinearSpec, target: Target, columns: int) -> int:
    """Return how many float32 accumulators a block may hold without spilling registers.

    Measured by disassembly: at 128x256 on sm_90 only a plain, unmasked projection stays free of spills (GELU by erf
    there spills 840 B, a masked store 256 B); sm_80 keeps both accumulators and operands in registers; rows that are
    not a multiple of 16 bytes are loaded in small pieces with an address each; float32 has no wide tensor-core form.
    """
    if spec.dtype == "float32" or spec.in_features * ITEM_BYTES[spec.dtype] % 16:
        return 64 * 128
    plain = spec.epilogue.is_identity and spec.out_features % columns == 0
    wide = plain or (spec.halves == 2 and target.name != "sm_80")
    return 128 * 256 if wide else 128 * 128


def choose(spec: LinearSpec, target: Target, load: int, experts: int, block_m: int | None = None) -> Schedule:
    """Return the schedule of a grouped projection for ``load`` rows per expert.

    ``block_m`` is given where kernels share a tile map. Ties go to the larger tile.
    """
    if target.is_interpreter:
        return interpreter_schedule(spec, block_m)
    block_m = block_m or row_tile(load)
    candidates = list(_candidates(spec, target, block_m))

    def price(s: Schedule) -> tuple[float, int]:
        sizes = (load, experts, spec.out_features, spec.in_features, s.block_m, s.block_n)
        return float(_cost()(*sizes, target.processors, efficiency(s.block_m, s.block_n))), -s.block_n

    best = min(candidates, key=price)
    return Schedule(
        best.block_m, best.block_n, best.block_k, best.num_warps, best.num_stages, group_height(spec, target, best)
    )


def group_height(spec: LinearSpec, target: Target, schedule: Schedule) -> int:
    """Return how many row tiles are walked together: their inputs fill at most a quarter of the L2 cache."""
    tile_bytes = schedule.block_m * spec.in_features * ITEM_BYTES[spec.dtype]
    fitting = max(1, target.l2_bytes // 4 // tile_bytes)
    return int(min(64, 1 << (fitting.bit_length() - 1)))


def interpreter_schedule(spec: LinearSpec, block_m: int | None = None) -> Schedule:
    """Return few, large tiles: the interpreter pays per program and per step, not per product."""
    block_n = min(64, max(16, _power_of_two(spec.out_features)))
    block_k = min(64, max(16, _power_of_two(spec.in_features)))
    return Schedule(block_m or 32, block_n, block_k, 1, 1, 4)


def combine_columns(spec: CombineSpec) -> tuple[int, int]:
    """Return columns per program and warps of a combine kernel."""
    columns = min(1024, max(16, _power_of_two(spec.features)))
    return columns, max(1, min(4, columns // 256))


def _power_of_two(value: int) -> int:
    return int(1 << max(0, value - 1).bit_length())


def explain() -> str:
    """Return the cost model as text."""
    return f"cost = {cost_expression()}"

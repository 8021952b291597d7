"""How a kernel is tiled: the configurations a target can hold, ranked by the cost model (`moefx.codegen.cost`).

The choice depends on the spec, the target and the load class, never on a number of tokens, and is the same every time.
What a device measures instead is in `moefx.codegen.tune`, what was found for common shapes in `moefx.codegen.table`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moefx.codegen import table
from moefx.codegen.cost import estimate, stage_bytes
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
    #: In how many parts K is multiplied, by programs of their own; a second launch adds them in order.
    parts: int = 1
    #: Whether the weights are the first operand of products, whose 64 rows wide matrix instructions fill.
    swapped: bool = False

    @property
    def form(self) -> str:
        """What kind of kernel it makes; kinds compete for a place among those that are timed."""
        if self.variant == "tma":
            return "tma divided" if self.warp_specialize else "tma"
        return "swapped" if self.swapped else "pointer"

    @property
    def streams(self) -> bool:
        """Whether tiles are so low that weights are the traffic and are read once."""
        return self.block_m <= STREAMED_ROWS

    def partials(self, halves: int) -> int:
        """Return how many sums of each result are stored and added later; none where K is whole."""
        return self.parts * halves if self.parts > 1 else 0

    def describe(self) -> str:
        """Return the schedule in one line."""
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        text = f"tile {tile}, {self.num_warps} warps, {self.num_stages} stages, groups of {self.group_m} row tiles"
        text += f", K in {self.parts} parts" if self.parts > 1 else ""
        text += ", operands swapped" if self.swapped else ""
        if self.variant == "pointer":
            return text
        return f"{text}, {self.programs} programs{', divided warps' if self.warp_specialize else ''}"


_COLUMNS = (256, 128, 64, 32, 16)
#: Height of the lowest row tile.
MIN_ROW_TILE = 16
#: Up to this height the rows of an expert fit one tile, and its weights are read once.
STREAMED_ROWS = 32
_PARTS = (1, 2, 4, 8)
#: How many schedules of a class are worth timing.
SHORT_LIST = 5


def load_class(rows: int, experts: int) -> int:
    """Return rows per expert rounded up to 1, 4, or a power of two from 16 to 4096: what a schedule may depend on.

    The number of tokens itself is no part of the choice, so a new batch size does not mean a new kernel. Below 16 rows
    tiles are the same; what differs is how many experts have rows at all.
    """
    mean = max(1, -(-rows // max(1, experts)))
    if mean <= MIN_ROW_TILE:
        return next(bound for bound in (1, 4, MIN_ROW_TILE) if mean <= bound)
    return int(min(4096, 1 << (mean - 1).bit_length()))


def row_tile(load: int) -> int:
    """Return the row tile for a load class: below 64 rows the tensor cores' wide instructions do not apply anyway."""
    return 32 if load == 32 else 16 if load <= 16 else 64 if load <= 64 else 128


def choose(spec: LinearSpec, target: Target, load: int, experts: int, block_m: int | None = None) -> Schedule:
    """Return the schedule of a grouped projection for ``load`` rows per expert: from the table, else by the model.

    ``block_m`` is given where kernels share a tile map.
    """
    if target.is_interpreter:
        return interpreter_schedule(spec, block_m)
    known = table.lookup(spec, target, load, experts, block_m or row_tile(load))
    return Schedule(**known) if known else ranked(spec, target, load, experts, block_m)[0]


def ranked(
    spec: LinearSpec, target: Target, load: int, experts: int, block_m: int | None = None
) -> tuple[Schedule, ...]:
    """Return every configuration, the cheapest by the model first; ties go to the larger tile."""

    def price(schedule: Schedule) -> tuple[float, float, int]:
        found = estimate(spec, schedule, target, load, experts)
        return found.seconds, found.compute_s, -schedule.block_n

    return tuple(sorted(configurations(spec, target, block_m or row_tile(load)), key=price))


def short_list(
    spec: LinearSpec, target: Target, load: int, experts: int, block_m: int | None = None, count: int = SHORT_LIST
) -> tuple[Schedule, ...]:
    """Return the configurations that are worth timing: the best of each kind first, then the best of what is left."""
    order = ranked(spec, target, load, experts, block_m)
    best_of_kind = {(s.form, s.parts > 1): s for s in reversed(order)}
    kinds = [s for s in order if s in best_of_kind.values()]
    return tuple(dict.fromkeys([choose(spec, target, load, experts, block_m), *kinds, *order]))[:count]


def configurations(spec: LinearSpec, target: Target, block_m: int) -> Iterator[Schedule]:
    """Yield the tiles, warps and stages that the target can hold, of every variant that applies."""
    for schedule in _by_pointers(spec, target, block_m):
        yield schedule
        yield from _for_few_rows(spec, target, schedule) if schedule.streams else ()
    if why_no_descriptors(spec, target) is None and block_m >= 64:
        yield from _by_descriptors(spec, target, block_m)


def why_no_descriptors(spec: LinearSpec, target: Target) -> str | None:
    """Return why descriptors cannot load the operands of ``spec`` on ``target``, or ``None``."""
    if not target.has_tma and not target.is_interpreter:
        return f"{target.name} has no tensor memory accelerator"
    if spec.in_features * ITEM_BYTES[spec.dtype] % 16:
        return f"rows of {spec.in_features} {spec.dtype} values do not start at multiples of 16 bytes"
    if spec.dtype == "float32":
        return "float32 tiles fill shared memory before they hide its latency"
    return None


def _by_pointers(spec: LinearSpec, target: Target, block_m: int) -> Iterator[Schedule]:
    block_k = _block_k(spec)
    for columns in _columns(spec):
        accumulators, limit = block_m * columns * spec.halves, _accumulator_limit(spec, target, columns)
        if accumulators > limit:
            continue
        warps = 8 if accumulators >= min(limit, 128 * 128) else 4
        schedule = Schedule(block_m, columns, block_k, warps, 1, group_height(spec, target, block_m))
        stages = min(target.max_stages, target.shared_limit_bytes // stage_bytes(spec, schedule))
        if stages >= 1:
            yield replace(schedule, num_stages=min(stages, -(-spec.in_features // block_k) + 1))


def _for_few_rows(spec: LinearSpec, target: Target, base: Schedule) -> Iterator[Schedule]:
    """Yield what lets more bytes of the weights be on their way at once than one tile per program does.

    Longer steps ask for more of each row; programs that share K are more in number; with swapped operands the weights
    fill the wide instructions of sm_90 and sm_100, which 16 rows do not; two accumulators of 256 columns spill 200 B
    there with Triton 3.6.
    """
    wider = replace(base, block_k=2 * base.block_k)
    stages = min(target.max_stages, target.shared_limit_bytes // stage_bytes(spec, wider))
    is_wider = stages >= 2 and spec.in_features >= 2 * wider.block_k and ITEM_BYTES[spec.dtype] == 2
    fills = base.block_n >= 64 and base.block_n * spec.halves <= 256
    can_swap = target.has_tma and ITEM_BYTES[spec.dtype] == 2 and fills
    for step in (base, replace(wider, num_stages=stages)) if is_wider else (base,):
        # Every part takes steps enough to fill its stages.
        most = max(1, spec.in_features // (step.block_k * step.num_stages))
        for parts in _PARTS:
            for swapped in (False, True) if can_swap else (False,):
                made = replace(step, parts=parts, swapped=swapped)
                if parts <= most and made != base:
                    yield made


def _by_descriptors(spec: LinearSpec, target: Target, block_m: int) -> Iterator[Schedule]:
    """Yield divided and undivided forms; what divides, and what spills, is known from compiled kernels only.

    Triton 3.6 and 3.9 on sm_90: 4 warps and an outer loop that is not flattened; at 128x256 any epilogue spills. On
    sm_100: 8 warps and a flattened loop; 128x256 spills, and two accumulators do not compile when divided.
    """
    is_hopper = target.name == "sm_90"
    for columns in _columns(spec):
        accumulators = block_m * columns * spec.halves
        base = Schedule(
            block_m, columns, _block_k(spec), 8, 1, group_height(spec, target, block_m),
            variant="tma", programs=target.processors, descriptor_gather=spec.gather and not is_hopper,
        )  # fmt: skip
        # The store of a result is staged in shared memory too.
        free = target.shared_limit_bytes - block_m * columns * ITEM_BYTES[spec.dtype] - 2048
        stages = min(target.max_stages, free // stage_bytes(spec, base))
        if stages < 2 or columns < 64 or accumulators > 128 * 256:
            continue
        wide = is_hopper and not spec.keep and (spec.epilogue.is_identity or spec.halves == 2)
        if accumulators <= (128 * 256 if wide else 128 * 128) and (is_hopper or spec.halves == 1):
            divided = replace(base, num_stages=stages, warp_specialize=True, flatten=not is_hopper)
            yield replace(divided, num_warps=4 if is_hopper else 8)
        if accumulators <= 128 * 128 or (spec.epilogue.is_identity and not spec.keep) or wide:
            yield replace(base, num_stages=stages)


def _columns(spec: LinearSpec) -> list[int]:
    return [columns for columns in _COLUMNS if columns <= max(16, _power_of_two(spec.out_features))]


def _block_k(spec: LinearSpec) -> int:
    """Return the step over K: one line of 128 bytes, less where K is shorter."""
    return min(128 // ITEM_BYTES[spec.dtype], max(16, _power_of_two(spec.in_features)))


def _accumulator_limit(spec: LinearSpec, target: Target, columns: int) -> int:
    """Return how many float32 accumulators a block may hold without spilling registers.

    Measured by disassembly: at 128x256 on sm_90 only a plain, unmasked projection stays free of spills (GELU by erf
    there spills 840 B, a masked store 256 B); sm_80 keeps both accumulators and operands in registers; rows that are
    not a multiple of 16 bytes are loaded in small pieces with an address each; float32 has no wide tensor-core form;
    two accumulators of 128x128 that are stored as well spill 88 B.
    """
    if spec.dtype == "float32" or spec.in_features * ITEM_BYTES[spec.dtype] % 16:
        return 64 * 128
    if spec.keep:
        return 128 * 128
    plain = spec.epilogue.is_identity and spec.out_features % columns == 0
    wide = plain or (spec.halves == 2 and target.name != "sm_80")
    return 128 * 256 if wide else 128 * 128


def group_height(spec: LinearSpec, target: Target, block_m: int) -> int:
    """Return how many row tiles are walked together: their inputs fill at most a quarter of the L2 cache."""
    tile_bytes = block_m * spec.in_features * ITEM_BYTES[spec.dtype]
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

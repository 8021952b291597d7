"""Tiles of the kernels that are no forward projection: a few each, ranked by the cost model, checked by compilation."""

from __future__ import annotations

from moefx.codegen.cost import estimate
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, LinearSpec
from moefx.codegen.targets import Target

_WIDTHS = (128, 64, 32)
#: Experts that tiles are priced for; a kernel outside of the forward pass does not know how many there are.
EXPERTS = 8


def power_of_two(value: int, least: int = 16) -> int:
    """Return the next power of two, at least ``least``."""
    return max(least, 1 << max(0, value - 1).bit_length())


def column_tiles(features: int) -> Schedule:
    """Return the tiles of a kernel whose programs copy or add up to 1024 columns of one token each."""
    columns = min(1024, power_of_two(features))
    return Schedule(1, columns, 16, max(1, min(4, columns // 256)), 1, 1)


def ranked_tiles(
    target: Target, like: LinearSpec, load: int, block_m: int, widest: int, groups: int = EXPERTS
) -> tuple[Schedule, ...]:
    """Return the tiles of a kernel that multiplies as the projection ``like`` does, the cheapest by the model first.

    ``load`` is the number of rows of each of the ``groups``; ties go to the wider tile.
    """
    widths = [width for width in _WIDTHS if width <= widest] if not target.is_interpreter else [widest]
    made = [gemm_tiles(target, like.dtype, like.in_features, like.out_features, block_m, width) for width in widths]

    def price(schedule: Schedule) -> tuple[float, int]:
        return estimate(like, schedule, target, load, groups).seconds, -schedule.block_n

    return tuple(sorted(dict.fromkeys(made), key=price))


def gemm_tiles(target: Target, dtype: str, reduced: int, columns: int, block_m: int, widest: int) -> Schedule:
    """Return the tiles of a product ``[block_m, reduced] @ [reduced, columns]``.

    ``widest`` bounds the columns of a tile.
    """
    item = ITEM_BYTES[dtype]
    if target.is_interpreter:
        return Schedule(block_m, min(64, power_of_two(columns)), min(64, power_of_two(reduced)), 1, 1, 4)
    # float32 has no wide tensor-core form: its operands pass through registers.
    block_n = min(widest if item == 2 else min(64, widest), power_of_two(columns))
    block_k = min(128 // item, power_of_two(reduced))
    warps = 8 if block_m * block_n >= (128 * 64 if item == 4 else 128 * 128) else 4
    stage = (block_m + block_n) * block_k * item
    # The epilogue stages its tile in shared memory too.
    free = target.shared_limit_bytes - block_m * block_n * 4
    return Schedule(block_m, block_n, block_k, warps, max(1, min(target.max_stages, free // stage)), 8)

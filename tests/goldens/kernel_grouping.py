"""grouping: pairs (token, slot) sorted by expert, and the row tiles of the sorted rows.

order is what moefx::group returns; position[order[r]] = r; tile i is as in the tile map kernel

Made by moefx.codegen; edits are overwritten.
One module for all models.
"""

import triton
import triton.language as tl


@triton.jit
def _group(experts_ptr, row, end, experts):
    """Return the group of pairs, -1 beyond the end; what is no expert belongs to group E."""
    group = tl.load(experts_ptr + row, mask=row < end, other=0).to(tl.int64)
    group = tl.where((group >= 0) & (group < experts), group, experts)
    return tl.where(row < end, group, -1).to(tl.int32)


@triton.jit
def count(experts_ptr, counts_ptr, experts, rows, per_block, STEP: tl.constexpr, GROUPS: tl.constexpr):
    """counts[b, g] = number of pairs of group g in block b."""
    block = tl.program_id(0)
    start = block * per_block
    end = tl.minimum(start + per_block, rows)
    group = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, per_block, STEP):
        mine = _group(experts_ptr, start + first + tl.arange(0, STEP), end, experts)
        total += tl.sum((mine[:, None] == group[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + block * GROUPS + group, total)


@triton.jit
def kernel(
    experts_ptr,  # ids [R] of any integer dtype
    counts_ptr,  # int32 [B, G]
    order_ptr,  # int64 [R], the pair of each sorted row
    offsets_ptr,  # int64 [E + 1], first row of each expert, then the first row without one
    position_ptr,  # int64 [R], the sorted row of each pair
    map_ptr,  # int32 [3, TILES]: expert, first row, end row of each tile; -1 beyond the last tile
    experts,
    rows,
    per_block,
    blocks,
    tiles,
    tiles_per_block,
    BLOCK_M: tl.constexpr,
    STEP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    before = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, blocks, 16):
        other = first + tl.arange(0, 16)
        at = counts_ptr + other[:, None] * GROUPS + group[None, :]
        counts = tl.load(at, mask=(other < blocks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < block)[:, None], counts, 0), 0)
    offset = tl.cumsum(total, 0) - total
    if block == 0:
        tl.store(offsets_ptr + group, offset.to(tl.int64), mask=group <= experts)

    start = block * per_block
    end = tl.minimum(start + per_block, rows)
    free = offset + before
    step = tl.arange(0, STEP)
    for first in range(0, per_block, STEP):
        row = start + first + step
        mine = _group(experts_ptr, row, end, experts)
        earlier = (mine[:, None] == mine[None, :]) & (step[None, :] < step[:, None])
        is_of = mine[:, None] == group[None, :]
        place = tl.sum(tl.where(is_of, free[None, :], 0), 1) + tl.sum(earlier.to(tl.int32), 1)
        free += tl.sum(is_of.to(tl.int32), 0)
        tl.store(order_ptr + place, row.to(tl.int64), mask=row < end)
        tl.store(position_ptr + row, place.to(tl.int64), mask=row < end)

    # The row tiles, a share of them by each block.
    tiles_in_group = tl.where(group <= experts, (total + BLOCK_M - 1) // BLOCK_M, 0)
    last_tile = tl.cumsum(tiles_in_group, 0)
    first_tile = last_tile - tiles_in_group
    first_row = offset - first_tile * BLOCK_M  # of tile 0, were it of this group
    last_row = offset + total
    for first in range(0, tiles_per_block, STEP):
        number = first + step
        tile = block * tiles_per_block + number
        inside = (number < tiles_per_block) & (tile < tiles)
        has = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
        exists = tl.sum(has.to(tl.int32), 1) > 0
        expert = tl.sum(tl.where(has, group[None, :], 0), 1)
        row = tl.sum(tl.where(has, first_row[None, :], 0), 1) + tile * BLOCK_M
        row_end = tl.minimum(tl.sum(tl.where(has, last_row[None, :], 0), 1), row + BLOCK_M)
        tl.store(map_ptr + tile, tl.where(exists, expert, -1), mask=inside)
        tl.store(map_ptr + tiles + tile, tl.where(exists, row, -1), mask=inside)
        tl.store(map_ptr + 2 * tiles + tile, tl.where(exists, row_end, -1), mask=inside)


def blocks_of(rows):
    """Return how many blocks share the pairs, and how many pairs a block has."""
    blocks = max(1, min(triton.cdiv(rows, 128), 256))
    return blocks, triton.cdiv(rows, blocks)


def launch(experts, counts, order, offsets, position, tile_map, block_m):
    """Write ``order`` [R], ``offsets`` [E + 1], ``position`` [R] and ``tile_map`` [3, TILES].

    ``counts`` int32 [B, G] is scratch, where G is a power of two above E and B at least what ``blocks_of`` says.
    """
    rows, number, tiles = order.shape[0], offsets.shape[0] - 1, tile_map.shape[1]
    blocks, per_block = blocks_of(rows)
    groups = counts.shape[1]
    step = max(16, min(64, 8192 // groups))
    count[(blocks,)](experts, counts, number, rows, per_block, STEP=step, GROUPS=groups, num_warps=4)
    kernel[(blocks,)](
        experts,
        counts,
        order,
        offsets,
        position,
        tile_map,
        number,
        rows,
        per_block,
        blocks,
        tiles,
        triton.cdiv(tiles, blocks),
        BLOCK_M=block_m,
        STEP=step,
        GROUPS=groups,
        num_warps=4,
    )

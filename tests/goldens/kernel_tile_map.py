"""tile_map: row tiles of a sorted batch.

tile i covers rows [row[i], end[i]) of expert[i]; expert E stands for the dropped rows

Made by moefx.codegen; edits are overwritten.
One kernel for all models; a region builds its map once and every projection reads it.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    offsets_ptr,  # int64 [E + 1], first row of each expert, then the first dropped row
    map_ptr,  # int32 [3, TILES]: expert, first row, end row of each tile; -1 beyond the last tile
    experts,
    rows,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two, at least E + 1
):
    """Find the expert and the rows of every row tile. Group E holds the dropped rows, so that they are written too."""
    group = tl.arange(0, GROUPS)
    start = tl.load(offsets_ptr + group, mask=group <= experts, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=group < experts, other=0)
    end = tl.where(group == experts, rows, end)
    tiles_in_group = tl.where(group <= experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    last_tile = tl.cumsum(tiles_in_group, 0)
    first_tile = last_tile - tiles_in_group

    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
    first_row = start[None, :] + (tile[:, None] - first_tile[None, :]) * BLOCK_M
    exists = tl.sum(mine.to(tl.int32), 1) > 0
    expert = tl.sum(tl.where(mine, group[None, :], 0), 1)
    row = tl.sum(tl.where(mine, first_row, 0), 1)
    row_end = tl.sum(tl.where(mine, end[None, :], 0), 1)
    row_end = tl.minimum(row_end, row + BLOCK_M)
    tl.store(map_ptr + tile, tl.where(exists, expert, -1).to(tl.int32), mask=tile < tiles)
    tl.store(map_ptr + tiles + tile, tl.where(exists, row, -1).to(tl.int32), mask=tile < tiles)
    tl.store(map_ptr + 2 * tiles + tile, tl.where(exists, row_end, -1).to(tl.int32), mask=tile < tiles)


def launch(offsets, tile_map, rows, block_m):
    """Fill ``tile_map`` int32 [3, TILES]; TILES is a bound known to the host, so the device is never waited for."""
    experts, tiles = offsets.shape[0] - 1, tile_map.shape[1]
    groups, block_t = triton.next_power_of_2(experts + 1), 64
    kernel[(triton.cdiv(tiles, block_t),)](
        offsets, tile_map, experts, rows, tiles, BLOCK_M=block_m, BLOCK_T=block_t, GROUPS=groups, num_warps=4
    )

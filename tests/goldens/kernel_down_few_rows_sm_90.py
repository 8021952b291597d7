"""grouped_linear_4608x1152_bfloat16_6e9654fe3b: grouped projection of routed rows.

z[r] = weight[e] @ x[r] + bias[e]   with e the expert of row r
out[r] = z[r]

Made by moefx.codegen; edits are overwritten.
K = 4608, N = 1152; tile 16x64x64, 4 warps, 4 stages, groups of 64 row tiles, K in 4 parts.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [R, K]
    weight_ptr,  # bfloat16 [E, 1152, K], contiguous
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    partial_ptr,  # float32 [4, R, N], the products of each part of K
    rows,
    x_stride,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Programs that run together share 64 row tiles, which stay in the L2 cache while the weights stream by.
    pid = tl.program_id(0)
    group = pid // (64 * 18)
    first = group * 64
    height = tl.minimum(tiles - first, 64)
    tile_m = first + pid % (64 * 18) % height
    tile_n = pid % (64 * 18) // height

    expert = tl.load(map_ptr + tile_m)
    if (expert < 0) | (expert == experts):  # no rows, or dropped ones, which are zero without products
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, 16)
    col = tile_n * 64 + tl.arange(0, 64)

    # Rows past the end of the group re-read its first row: finite data, no predicate in the loop, masked when stored.
    source = tl.where(row < row_end, row, row_start).to(tl.int64)
    weight_row = col
    part = tl.program_id(1)
    ks = part * 1152 + tl.arange(0, 64)
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = expert.to(tl.int64) * 5308416
    weight_tile = weight_row[None, :] * 4608 + ks[:, None]
    w0 = weight_ptr + weight + weight_tile
    z0 = tl.zeros((16, 64), tl.float32)
    for _ in range(0, 1152, 64):
        x_tile = tl.load(x)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
        w0_tile = tl.load(w0, eviction_policy="evict_first")
        if UPCAST:
            w0_tile = w0_tile.to(tl.float32)
        z0 = tl.dot(x_tile, w0_tile, z0)
        w0 += 64
        x += 64
    keep = (row < row_end)[:, None]
    at = (part * rows + row).to(tl.int64)[:, None] * 1152
    tl.store(partial_ptr + at + col[None, :], z0, mask=keep)


@triton.jit
def reduce(
    partial_ptr,  # float32 [4, R, N]
    bias_ptr,  # bfloat16 [E, 1152]
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # bfloat16 [R, N]
    rows,
    experts,
    tiles,
):
    """Add the parts of K, always in the same order."""
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    expert = tl.load(map_ptr + tile_m)
    if expert < 0:
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, 16)
    col = tile_n * 64 + tl.arange(0, 64)
    out = out_ptr + row.to(tl.int64)[:, None] * 1152 + col[None, :]
    keep = (row < row_end)[:, None]
    if expert == experts:  # dropped rows are zero, and always written
        tl.store(out, tl.zeros((16, 64), out_ptr.dtype.element_ty), mask=keep)
        return
    weight_row = col
    z0 = tl.zeros((16, 64), tl.float32)
    for part in tl.static_range(4):
        at = (part * rows + row).to(tl.int64)[:, None] * 1152
        z0 += tl.load(partial_ptr + at + col[None, :], mask=keep, other=0.0)
    bias = expert * 1152 + weight_row
    b0 = tl.load(bias_ptr + bias)
    z0 += b0.to(tl.float32)[None, :]
    tl.store(out, z0.to(out_ptr.dtype.element_ty), mask=keep)


def launch(x, weight, bias, tile_map, partial, out, upcast):
    """Write ``out`` [R, N]; ``partial`` is scratch."""
    tiles = tile_map.shape[1]
    kernel[(tiles * 18, 4)](
        x,
        weight,
        tile_map,
        partial,
        out.shape[0],
        x.stride(0),
        weight.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps=4,
        num_stages=4,
    )
    reduce[(tiles, 18)](
        partial,
        bias,
        tile_map,
        out,
        out.shape[0],
        weight.shape[0],
        tiles,
        num_warps=4,
    )

"""gather_gated_linear_1000x300_float16_2e270df7d8: grouped projection of routed rows.

z[r] = weight[e] @ x[order[r]]   with e the expert of row r
z0, z1 = the two halves of z; weight is [E, 2 N, K]
out[r] = epilogue(z), the program after the loop

Made by moefx.codegen; edits are overwritten.
K = 1000, N = 300; tile 64x64x64, 4 warps, 4 stages, groups of 64 row tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which is the right limit."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def kernel(
    x_ptr,  # float16 [T, K]
    weight_ptr,  # float16 [E, 600, K], contiguous
    order_ptr,  # int64 [R]
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # float16 [R, N]
    x_stride,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Programs that run together share 64 row tiles, which stay in the L2 cache while the weights stream by.
    pid = tl.program_id(0)
    group = pid // (64 * 5)
    first = group * 64
    height = tl.minimum(tiles - first, 64)
    tile_m = first + pid % (64 * 5) % height
    tile_n = pid % (64 * 5) // height

    expert = tl.load(map_ptr + tile_m)
    if expert < 0:
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, 64)
    col = tile_n * 64 + tl.arange(0, 64)
    out = out_ptr + row.to(tl.int64)[:, None] * 300 + col[None, :]
    keep = (row < row_end)[:, None] & (col < 300)[None, :]
    if expert == experts:  # dropped rows are zero, and always written
        tl.store(out, tl.zeros((64, 64), out_ptr.dtype.element_ty), mask=keep)
        return

    # Rows past the end of the group re-read its first row: finite data, no predicate in the loop, masked when stored.
    source = tl.where(row < row_end, row, row_start).to(tl.int64)
    source = tl.load(order_ptr + source)
    weight_row = tl.minimum(col, 299)
    ks = tl.arange(0, 64)
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = expert.to(tl.int64) * 600000
    weight_tile = weight_row[None, :] * 1000 + ks[:, None]
    w0 = weight_ptr + weight + weight_tile
    z0 = tl.zeros((64, 64), tl.float32)
    w1 = weight_ptr + weight + 300000 + weight_tile
    z1 = tl.zeros((64, 64), tl.float32)
    for k0 in range(0, 1000, 64):
        x_tile = tl.load(x, mask=(ks < 1000 - k0)[None, :], other=0.0)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
        w0_tile = tl.load(w0, mask=(ks < 1000 - k0)[:, None], other=0.0)
        if UPCAST:
            w0_tile = w0_tile.to(tl.float32)
        z0 = tl.dot(x_tile, w0_tile, z0)
        w0 += 64
        w1_tile = tl.load(w1, mask=(ks < 1000 - k0)[:, None], other=0.0)
        if UPCAST:
            w1_tile = w1_tile.to(tl.float32)
        z1 = tl.dot(x_tile, w1_tile, z1)
        w1 += 64
        x += 64

    # Epilogue, in float32.
    v0 = _sigmoid(z0)
    v1 = z0 * v0
    v2 = v1 * z1
    tl.store(out, v2.to(out_ptr.dtype.element_ty), mask=keep)


def launch(x, weight, order, tile_map, out, upcast):
    """Write ``out`` [R, N]."""
    tiles = tile_map.shape[1]
    kernel[(tiles * 5,)](
        x,
        weight,
        order,
        tile_map,
        out,
        x.stride(0),
        weight.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps=4,
        num_stages=4,
    )

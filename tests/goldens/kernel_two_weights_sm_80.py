"""gather_gated_linear_1152x4608_bfloat16_154a900e28: grouped projection of routed rows.

z0[r] = weight0[e] @ x[order[r] // 2] + bias0[e]   with e the expert of row r
z1[r] = weight1[e] @ x[order[r] // 2] + bias1[e]   with e the expert of row r
out[r] = epilogue(z0, z1), the program after the loop

Made by moefx.codegen; edits are overwritten.
K = 1152, N = 4608; tile 128x64x64, 8 warps, 4 stages, groups of 32 row tiles.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which is the right limit."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [T, K]
    weight0_ptr,  # bfloat16 [E, 4608, K], contiguous
    weight1_ptr,  # bfloat16 [E, 4608, K], contiguous
    bias0_ptr,  # bfloat16 [E, 4608]
    bias1_ptr,  # bfloat16 [E, 4608]
    order_ptr,  # int64 [R]
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # bfloat16 [R, N]
    x_stride,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Programs that run together share 32 row tiles, which stay in the L2 cache while the weights stream by.
    pid = tl.program_id(0)
    group = pid // (32 * 72)
    first = group * 32
    height = tl.minimum(tiles - first, 32)
    tile_m = first + pid % (32 * 72) % height
    tile_n = pid % (32 * 72) // height

    expert = tl.load(map_ptr + tile_m)
    if expert < 0:
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, 128)
    col = tile_n * 64 + tl.arange(0, 64)
    out = out_ptr + row.to(tl.int64)[:, None] * 4608 + col[None, :]
    keep = (row < row_end)[:, None]
    if expert == experts:  # dropped rows are zero, and always written
        tl.store(out, tl.zeros((128, 64), out_ptr.dtype.element_ty), mask=keep)
        return

    # Rows past the end of the group re-read its first row: finite data, no predicate in the loop, masked when stored.
    source = tl.where(row < row_end, row, row_start).to(tl.int64)
    source = tl.load(order_ptr + source) // 2
    weight_row = col
    ks = tl.arange(0, 64)
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = expert.to(tl.int64) * 5308416
    weight_tile = weight_row[None, :] * 1152 + ks[:, None]
    w0 = weight0_ptr + weight + weight_tile
    z0 = tl.zeros((128, 64), tl.float32)
    w1 = weight1_ptr + weight + weight_tile
    z1 = tl.zeros((128, 64), tl.float32)
    for _ in range(0, 1152, 64):
        x_tile = tl.load(x)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
        w0_tile = tl.load(w0)
        if UPCAST:
            w0_tile = w0_tile.to(tl.float32)
        z0 = tl.dot(x_tile, w0_tile, z0)
        w0 += 64
        w1_tile = tl.load(w1)
        if UPCAST:
            w1_tile = w1_tile.to(tl.float32)
        z1 = tl.dot(x_tile, w1_tile, z1)
        w1 += 64
        x += 64
    bias = expert * 4608 + weight_row
    b0 = tl.load(bias0_ptr + bias)
    z0 += b0.to(tl.float32)[None, :]
    b1 = tl.load(bias1_ptr + bias)
    z1 += b1.to(tl.float32)[None, :]

    # Epilogue, in float32.
    v0 = _sigmoid(z1)
    v1 = z1 * v0
    v2 = v1 * z0
    tl.store(out, v2.to(out_ptr.dtype.element_ty), mask=keep)


def launch(x, weight0, weight1, bias0, bias1, order, tile_map, out, upcast):
    """Write ``out`` [R, N]."""
    tiles = tile_map.shape[1]
    kernel[(tiles * 72,)](
        x,
        weight0,
        weight1,
        bias0,
        bias1,
        order,
        tile_map,
        out,
        x.stride(0),
        weight0.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps=8,
        num_stages=4,
    )

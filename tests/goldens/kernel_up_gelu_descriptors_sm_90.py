"""gather_grouped_linear_1152x4608_bfloat16_d2bcf831e4: grouped projection, loaded by descriptors.

z[r] = weight[e] @ x[order[r] // 2] + bias[e]   with e the expert of row r
out[r] = epilogue(z), the program after the loop

Made by moefx.codegen; edits are overwritten.
K = 1152, N = 4608; tile 128x128x64, 4 warps, 4 stages, groups of 32 row tiles, 132 programs, divided warps.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which is the right limit."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def permute(x_ptr, order_ptr, sorted_ptr, rows, x_stride, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """sorted[r] = x[order[r] // 2], so that one instruction copies a tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = tl.load(order_ptr + row, mask=row < rows, other=0) // 2
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (col < 1152)[None, :]
    values = tl.load(x_ptr + source[:, None] * x_stride + col[None, :], mask=mask)
    tl.store(sorted_ptr + row[:, None] * 1152 + col[None, :], values, mask=mask)


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [R, K]
    weight_ptr,  # bfloat16 [E, 4608, K], contiguous
    bias_ptr,  # bfloat16 [E, 4608]
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # bfloat16 [R, N]
    x_stride,
    rows,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Coordinates past the end read zeros; rows of a neighbouring expert are finite data that no store writes.
    x_desc = tl.make_tensor_descriptor(
        x_ptr,
        shape=[rows, 1152],
        strides=[x_stride, 1],
        block_shape=[128, 64],
    )
    weight_desc = tl.make_tensor_descriptor(
        weight_ptr,
        shape=[experts * 4608, 1152],
        strides=[1152, 1],
        block_shape=[128, 64],
    )

    # The map is padded to a bound that the host knows; how many tiles there are is counted here.
    valid = 0
    for start in range(0, tiles, 1024):
        tile = start + tl.arange(0, 1024)
        valid += tl.sum((tl.load(map_ptr + tile, mask=tile < tiles, other=-1) >= 0).to(tl.int32))

    # A program walks over tiles; those that run together share 32 row tiles, which stay in the L2 cache.
    for tile in tl.range(
        tl.program_id(0),
        valid * 36,
        tl.num_programs(0),
        flatten=False,
        warp_specialize=True,
    ):
        group = tile // (32 * 36)
        first = group * 32
        height = tl.minimum(valid - first, 32)
        tile_m = first + tile % (32 * 36) % height
        tile_n = tile % (32 * 36) // height
        expert = tl.load(map_ptr + tile_m)
        row_start = tl.load(map_ptr + tiles + tile_m)
        row_end = tl.load(map_ptr + 2 * tiles + tile_m)
        # Dropped rows (expert E) are multiplied by the last expert and then written as zero: a loop that divides roles
        # between warps may not branch.
        weight_row = tl.minimum(expert, experts - 1) * 4608 + tile_n * 128
        row = row_start + tl.arange(0, 128)

        z0 = tl.zeros((128, 128), tl.float32)
        for k0 in range(0, 1152, 64):
            x_tile = x_desc.load([row_start, k0])
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
            w0_tile = weight_desc.load([weight_row, k0])
            if UPCAST:
                w0_tile = w0_tile.to(tl.float32)
            z0 = tl.dot(x_tile, w0_tile.T, z0)

        col = tile_n * 128 + tl.arange(0, 128)
        bias = weight_row + tl.arange(0, 128)
        z0 += tl.load(bias_ptr + bias).to(tl.float32)[None, :]
        keep = (row < row_end)[:, None]
        # Epilogue, in float32.
        v0 = z0 * z0
        v1 = v0 * z0
        v2 = v1 * 0.044715
        v3 = z0 + v2
        v4 = v3 * 0.7978845608028654
        v5 = z0 * 0.5
        v6 = v4 * 2.0
        v7 = _sigmoid(v6)
        v8 = v7 * 2.0
        v9 = v5 * v8
        result = tl.where(expert < experts, v9, 0.0)
        out = out_ptr + row.to(tl.int64)[:, None] * 4608 + col[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=keep)


def aligned(tensor):
    """Copy a tensor whose rows do not start at multiples of 16 bytes, as descriptors want them."""
    if tensor.stride(0) * 2 % 16:
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(x, weight, bias, order, tile_map, out, upcast):
    """Write ``out`` [R, N]."""
    rows, tiles = out.shape[0], tile_map.shape[1]
    permuted = x.new_empty((rows, 1152))
    grid = (triton.cdiv(rows, 8), triton.cdiv(1152, 1024))
    permute[grid](x, order, permuted, rows, x.stride(0), BLOCK_R=8, BLOCK_K=1024)
    x = permuted
    # Descriptors live in scratch memory; the stream orders its next use after this launch.
    triton.set_allocator(lambda size, alignment, stream: tile_map.new_empty((size // 4 + 1,)))
    kernel[(min(tiles * 36, 132),)](
        x,
        aligned(weight),
        bias,
        tile_map,
        out,
        x.stride(0),
        rows,
        weight.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps=4,
        num_stages=4,
    )

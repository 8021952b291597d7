"""grouped_linear_4608x1152_bfloat16_6e9654fe3b: grouped projection, loaded by descriptors.

z[r] = weight[e] @ x[r] + bias[e]   with e the expert of row r
out[r] = z[r]

Made by moefx.codegen; edits are overwritten.
K = 4608, N = 1152; tile 128x128x64, 4 warps, 4 stages, groups of 8 row tiles, 132 programs, divided warps.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [R, K]
    weight_ptr,  # bfloat16 [E, 1152, K], contiguous
    bias_ptr,  # bfloat16 [E, 1152]
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
        shape=[rows, 4608],
        strides=[x_stride, 1],
        block_shape=[128, 64],
    )
    weight_desc = tl.make_tensor_descriptor(
        weight_ptr,
        shape=[experts * 1152, 4608],
        strides=[4608, 1],
        block_shape=[128, 64],
    )

    # The map is padded to a bound that the host knows; how many tiles there are is counted here.
    valid = 0
    for start in range(0, tiles, 1024):
        tile = start + tl.arange(0, 1024)
        valid += tl.sum((tl.load(map_ptr + tile, mask=tile < tiles, other=-1) >= 0).to(tl.int32))

    # A program walks over tiles; those that run together share 8 row tiles, which stay in the L2 cache.
    for tile in tl.range(
        tl.program_id(0),
        valid * 9,
        tl.num_programs(0),
        flatten=False,
        warp_specialize=True,
    ):
        group = tile // (8 * 9)
        first = group * 8
        height = tl.minimum(valid - first, 8)
        tile_m = first + tile % (8 * 9) % height
        tile_n = tile % (8 * 9) // height
        expert = tl.load(map_ptr + tile_m)
        row_start = tl.load(map_ptr + tiles + tile_m)
        row_end = tl.load(map_ptr + 2 * tiles + tile_m)
        # Dropped rows (expert E) are multiplied by the last expert and then written as zero: a loop that divides roles
        # between warps may not branch.
        weight_row = tl.minimum(expert, experts - 1) * 1152 + tile_n * 128
        row = row_start + tl.arange(0, 128)

        z0 = tl.zeros((128, 128), tl.float32)
        for k0 in range(0, 4608, 64):
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
        result = tl.where(expert < experts, z0, 0.0)
        out = out_ptr + row.to(tl.int64)[:, None] * 1152 + col[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=keep)


def aligned(tensor):
    """Copy a tensor whose rows do not start at multiples of 16 bytes, as descriptors want them."""
    if tensor.stride(0) * 2 % 16:
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def launch(x, weight, bias, tile_map, out, upcast):
    """Write ``out`` [R, N]."""
    rows, tiles = out.shape[0], tile_map.shape[1]
    x = aligned(x)
    # Descriptors live in scratch memory; the stream orders its next use after this launch.
    triton.set_allocator(lambda size, alignment, stream: tile_map.new_empty((size // 4 + 1,)))
    kernel[(min(tiles * 9, 132),)](
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

"""token_scatter_1152_bfloat16_6d989bc6f3: tokens put back into their sequence.

out[index[r]] = program(rows[r], ...), in float32; every other token as in x

Made by moefx.codegen; edits are overwritten.
D = 1152; 1024 columns per program, 4 warps.
"""

import triton
import triton.language as tl


@triton.jit
def invert(index_ptr, position_ptr, rows, BLOCK: tl.constexpr):
    """position[index[r]] = r: which row each token takes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row, mask=row < rows, other=0)
    tl.store(position_ptr + token, row, mask=row < rows)


@triton.jit
def kernel(
    rows_ptr,  # bfloat16 [R, D], contiguous
    x_ptr,  # bfloat16 [T, D]
    position_ptr,  # int64 [T]; -1 where a token stays as it is
    z1_ptr,  # [B, D], contiguous
    z2_ptr,  # [R], contiguous
    z3_ptr,  # [R, D], contiguous
    out_ptr,  # bfloat16 [T, D]
    x_stride,
    sample_rows,  # R / B
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    out = out_ptr + token * 1152 + col
    row = tl.load(position_ptr + token)
    if row < 0:
        tl.store(out, tl.load(x_ptr + token * x_stride + col, mask=col < 1152, other=0.0), mask=col < 1152)
        return
    z0 = tl.load(rows_ptr + row * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    z1 = tl.load(z1_ptr + row // sample_rows * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    z2 = tl.load(z2_ptr + row).to(tl.float32)
    z3 = tl.load(z3_ptr + row * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    v0 = z1 * z2
    v1 = v0 * z0
    v2 = z3 + v1
    tl.store(out, v2.to(out_ptr.dtype.element_ty), mask=col < 1152)


def launch(rows, x, index, position, z1, z2, z3, out):
    """Write ``out`` [T, D]; ``position`` int64 [T] is scratch and comes filled with -1."""
    invert[(triton.cdiv(index.shape[0], 1024),)](index, position, index.shape[0], BLOCK=1024)
    grid = (out.shape[0], 2)
    sample_rows = rows.shape[0] // z1.shape[0]
    kernel[grid](rows, x, position, z1, z2, z3, out, x.stride(0), sample_rows, num_warps=4)

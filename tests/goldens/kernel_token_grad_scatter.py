"""token_grad_scatter_plain_1152_bfloat16_0fee11776d: gradient of an expression over rows.

drow, d1, d2, ... from grad; a partial sum per chunk where a gradient is summed over rows

Made by moefx.codegen; edits are overwritten.
D = 1152; 8 warps per row.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    grad_ptr,  # bfloat16 [T, D]
    x_ptr,  # bfloat16 [R, D]
    index_ptr,  # int64 [R]
    z1_ptr,  # [B, D]
    z2_ptr,  # [R]
    z3_ptr,  # [R, D]
    drow_ptr,  # bfloat16 [R, D]
    d2_ptr,  # [R]
    d3_ptr,  # [R, D]
    partial_ptr,  # float32 [P, 1, D]
    grad_stride,
    x_stride,
    sample_rows,  # R / B
    chunks,  # of one sample
    chunk_rows,
):
    """Walk over one chunk of the rows of one sample: sums over its rows stay in registers, in one order."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    start = program % chunks * chunk_rows
    count = tl.minimum(sample_rows - start, chunk_rows)
    col = tl.arange(0, 2048)
    z1 = tl.load(z1_ptr + sample * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    sum1 = tl.zeros((2048,), tl.float32)
    for step in range(count):
        row = sample * sample_rows + start + step
        token = tl.load(index_ptr + row)
        g = tl.load(grad_ptr + token * grad_stride + col, mask=col < 1152, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + col, mask=col < 1152, other=0.0).to(tl.float32)
        z0 = x
        z2 = tl.load(z2_ptr + row).to(tl.float32)
        v0 = z1 * z2
        v1 = g * z0
        v2 = g * v0
        v3 = v1 * z2
        v4 = v1 * z1
        tl.store(d2_ptr + row, tl.sum(tl.where(col < 1152, v4, 0.0), 0))
        tl.store(d3_ptr + row * 1152 + col, g.to(d3_ptr.dtype.element_ty), mask=col < 1152)
        sum1 += v3
        drow = v2
        tl.store(drow_ptr + row * 1152 + col, drow.to(drow_ptr.dtype.element_ty), mask=col < 1152)
    tl.store(partial_ptr + (program * 1 + 0) * 1152 + col, sum1, mask=col < 1152)


def launch(grad, x, index, z1, z2, z3, drow, d2, d3, partial, samples, chunks, chunk_rows):
    """Write the gradients; ``chunks`` of ``chunk_rows`` rows cover the rows of each sample."""
    kernel[(samples * chunks,)](
        grad,
        x,
        index,
        z1,
        z2,
        z3,
        drow,
        d2,
        d3,
        partial,
        grad.stride(0),
        x.stride(0),
        drow.shape[0] // samples,
        chunks,
        chunk_rows,
        num_warps=8,
    )

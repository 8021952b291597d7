"""token_grad_gather_layer_1152_bfloat16_ea5144e5a7: gradient of an expression over rows.

drow, d1, d2, ... from grad; a partial sum per chunk where a gradient is summed over rows

Made by moefx.codegen; edits are overwritten.
D = 1152; 8 warps per row.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    grad_ptr,  # bfloat16 [R, D]
    x_ptr,  # bfloat16 [T, D]
    index_ptr,  # int64 [R]
    added_ptr,  # bfloat16 [R, D]
    z1_ptr,  # [B, D]
    z2_ptr,  # [B, D]
    drow_ptr,  # bfloat16 [R, D]
    partial_ptr,  # float32 [P, 2, D]
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
    sum2 = tl.zeros((2048,), tl.float32)
    for step in range(count):
        row = sample * sample_rows + start + step
        token = tl.load(index_ptr + row)
        g = tl.load(grad_ptr + row * grad_stride + col, mask=col < 1152, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * x_stride + col, mask=col < 1152, other=0.0).to(tl.float32)
        mean = tl.sum(x, 0) * 0.0008680555555555555
        x = tl.where(col < 1152, x - mean, 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) * 0.0008680555555555555 + 1e-06)
        z0 = x * factor
        v0 = g * z1
        v1 = g * z0
        sum1 += v1
        sum2 += g
        drow = tl.where(col < 1152, v0, 0.0)
        along = tl.sum(drow * z0, 0) * 0.0008680555555555555
        drow = (drow - tl.sum(drow, 0) * 0.0008680555555555555 - z0 * along) * factor
        drow += tl.load(added_ptr + row * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
        tl.store(drow_ptr + row * 1152 + col, drow.to(drow_ptr.dtype.element_ty), mask=col < 1152)
    tl.store(partial_ptr + (program * 2 + 0) * 1152 + col, sum1, mask=col < 1152)
    tl.store(partial_ptr + (program * 2 + 1) * 1152 + col, sum2, mask=col < 1152)


def launch(grad, x, index, added, z1, z2, drow, partial, samples, chunks, chunk_rows):
    """Write the gradients; ``chunks`` of ``chunk_rows`` rows cover the rows of each sample."""
    kernel[(samples * chunks,)](
        grad,
        x,
        index,
        added,
        z1,
        z2,
        drow,
        partial,
        grad.stride(0),
        x.stride(0),
        drow.shape[0] // samples,
        chunks,
        chunk_rows,
        num_warps=8,
    )

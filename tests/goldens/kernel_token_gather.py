"""token_gather_layer_1152_bfloat16_ad47b06b27: tokens taken out of a sequence, layer norm, modulated.

out[r] = program(norm(x[index[r]]), ...), the statements before the store, in float32

Made by moefx.codegen; edits are overwritten.
D = 1152; one token per program, 8 warps.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [T, D]
    index_ptr,  # int64 [R]
    z1_ptr,  # [B, D], contiguous
    z2_ptr,  # [B, D], contiguous
    out_ptr,  # bfloat16 [R, D]
    rows_ptr,  # bfloat16 [R, D], the tokens as they were
    x_stride,
    sample_rows,  # R / B
):
    """One token, read once: its sums stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, 2048)
    source = tl.load(index_ptr + row)
    x = tl.load(x_ptr + source * x_stride + col, mask=col < 1152, other=0.0)
    tl.store(rows_ptr + row * 1152 + col, x, mask=col < 1152)
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) * 0.0008680555555555555
    x = tl.where(col < 1152, x - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) * 0.0008680555555555555 + 1e-06)
    z0 = x * factor
    z1 = tl.load(z1_ptr + row // sample_rows * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    z2 = tl.load(z2_ptr + row // sample_rows * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
    v0 = z0 * z1
    v1 = v0 + z2
    tl.store(out_ptr + row * 1152 + col, v1.to(out_ptr.dtype.element_ty), mask=col < 1152)


def launch(x, index, z1, z2, out, rows):
    """Write ``out`` [R, D] and ``rows`` [R, D]; rows of ``x`` may have any stride."""
    sample_rows = out.shape[0] // z1.shape[0]
    kernel[(out.shape[0],)](x, index, z1, z2, out, rows, x.stride(0), sample_rows, num_warps=8)

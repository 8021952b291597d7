"""choice_combine_1152_bfloat16_e64a482ac9: the rows of each token, weighted and added up.

out[t] = sum over the rows r of token t of weights[r] * rows[r]

Made by moefx.codegen; edits are overwritten.
D = 1152; 1024 columns per program, 4 warps.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    rows_ptr,  # bfloat16 [R, D]
    weights_ptr,  # float32 [R]
    first_ptr,  # int32 [T, E], a row of each token and expert; -1: none
    chain_ptr,  # int32 [R], another row of the same token and expert; -1: none
    out_ptr,  # bfloat16 [T, D]
    experts,
):
    """One token and 1024 columns: experts are added in order, so the result does not depend on scheduling."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float32)
    for expert in range(experts):
        row = tl.load(first_ptr + token * experts + expert)
        while row >= 0:
            value = tl.load(rows_ptr + row.to(tl.int64) * 1152 + col, mask=col < 1152, other=0.0).to(tl.float32)
            total += tl.load(weights_ptr + row) * value
            row = tl.load(chain_ptr + row)
    tl.store(out_ptr + token * 1152 + col, total.to(out_ptr.dtype.element_ty), mask=col < 1152)


def launch(rows, weights, first, chain, out):
    """Write ``out`` [T, D]."""
    kernel[(out.shape[0], 2)](rows, weights, first, chain, out, first.shape[1], num_warps=4)

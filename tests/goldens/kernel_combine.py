"""combine_1152_top2_bfloat16_f9b22b767d: weighted sum of the 2 rows of each token.

out[t] = sum over slots s of weights[t, s] * rows[position[t * 2 + s]], in float32

Made by moefx.codegen; edits are overwritten.
D = 1152; 1024 columns per program, 4 warps.
"""

import triton
import triton.language as tl


@triton.jit
def invert(order_ptr, position_ptr, rows, BLOCK: tl.constexpr):
    """position[order[r]] = r: where the row of each (token, slot) pair lies."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order_ptr + row, mask=row < rows, other=0)
    tl.store(position_ptr + slot, row, mask=row < rows)


@triton.jit
def kernel(
    rows_ptr,  # bfloat16 [R, D]
    position_ptr,  # int64 [T * k]
    weights_ptr,  # float32 [T, k], contiguous
    out_ptr,  # bfloat16 [T, D]
):
    """One token and 1024 columns: slots are added in order, so the result does not depend on scheduling."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    total = tl.zeros((1024,), tl.float32)
    for slot in tl.static_range(2):
        position = tl.load(position_ptr + token * 2 + slot)
        weight = tl.load(weights_ptr + token * 2 + slot)
        row = tl.load(rows_ptr + position * 1152 + col, mask=col < 1152, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out_ptr + token * 1152 + col, total.to(out_ptr.dtype.element_ty), mask=col < 1152)


def launch(rows, order, position, weights, out):
    """Write ``out`` [T, D]; ``position`` int64 [T * k] is scratch, or given where ``order`` is None."""
    if order is not None:
        invert[(triton.cdiv(order.shape[0], 1024),)](order, position, order.shape[0], BLOCK=1024)
    kernel[(out.shape[0], 2)](rows, position, weights, out, num_warps=4)

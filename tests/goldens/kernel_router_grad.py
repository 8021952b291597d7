"""router_grad_8_top8_999045ca26: gradient of a router to its logits.

d0 = gradient of x @ weight.T, and of the operands, for those of the outputs

Made by moefx.codegen; edits are overwritten.
E = 8; 32 tokens per program.
"""

import triton
import triton.language as tl


@triton.jit
def kernel(
    kept_ptr,  # float32 [T, E], the product that the forward pass kept
    z1_ptr,  # [E], contiguous
    index_ptr,  # int64 [T, K]
    g0_ptr,  # float32 [T, K], contiguous
    d0_ptr,  # float32 [T, E]
    tokens,
):
    token = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    expert = tl.arange(0, 16)
    source = tl.minimum(token, tokens - 1)
    column = tl.minimum(expert, 7)
    exists = (token < tokens)[:, None]
    known = (expert < 8)[None, :]
    z0 = tl.load(kept_ptr + source[:, None] * 8 + column[None, :])
    chosen = tl.zeros((32, 16), tl.int1)
    rank = tl.zeros((32, 16), tl.int32)
    for slot in range(8):
        hit = expert[None, :] == tl.load(index_ptr + source * 8 + slot)[:, None]
        chosen = chosen | hit
        rank = tl.where(hit, slot, rank)
    g0 = tl.load(g0_ptr + source[:, None] * 8 + rank, mask=chosen, other=0.0)

    # The derivative of the forward kernel's steps.
    v0 = z0
    v1 = tl.max(tl.where(chosen, v0, float("-inf")), 1)[:, None]
    v2 = v0 - v1
    v3 = tl.exp(v2)
    v4 = tl.sum(tl.where(chosen, v3, 0.0), 1)[:, None]
    v5 = v3 / v4
    v6 = g0 / v4
    v7 = v6 * v5
    v8 = -v7
    v9 = tl.sum(tl.where(chosen, v8, 0.0), 1)[:, None]
    v10 = tl.where(chosen, v9, 0.0)
    v11 = v6 + v10
    v12 = v11 * v3
    v13 = tl.where(chosen, v12, 0.0)
    at = token[:, None] * 8 + expert[None, :]
    tl.store(d0_ptr + at, v13, mask=known & exists)


def launch(kept, z1, index, g0, d0):
    """Write d0."""
    tokens = index.shape[0]
    kernel[(triton.cdiv(tokens, 32),)](
        kept,
        z1,
        index,
        g0,
        d0,
        tokens,
        num_warps=4,
    )

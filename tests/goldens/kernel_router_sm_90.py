"""router_1152x8_top8_bfloat16_1a0ea8362a: logits, scores, choice and gates of every token.

z0 = x @ weight.T; choose 8 by v6, ties to the lowest expert; then the gates

Made by moefx.codegen; edits are overwritten.
D = 1152, E = 8; 32 tokens per program.
"""

import triton
import triton.language as tl


@triton.jit
def _order(x):
    """Integers in the order of the floats: NaN above all, and zeros of both signs equal, as in a sort."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 2147483647))


@triton.jit
def kernel(
    x_ptr,  # bfloat16 [T, D]
    weight_ptr,  # float32 [E, D], contiguous
    z1_ptr,  # [E], contiguous
    index_ptr,  # int64 [T, K], the chosen experts, best first
    out0_ptr,  # float32 [T, K]
    x_stride,
    tokens,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    token = tl.program_id(0).to(tl.int64) * 32 + tl.arange(0, 32)
    expert = tl.arange(0, 16)
    # Tokens and experts that do not exist re-read existing ones; nothing of them is stored.
    source = tl.minimum(token, tokens - 1)
    column = tl.minimum(expert, 7)
    exists = (token < tokens)[:, None]
    known = (expert < 8)[None, :]

    ks = tl.arange(0, 64)
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = weight_ptr + column[None, :] * 1152 + ks[:, None]
    z0 = tl.zeros((32, 16), tl.float32)
    for _ in range(0, 1152, 64):
        x_tile = tl.load(x)
        w_tile = tl.load(weight)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
        for _p in tl.static_range(3):  # a float32 is the sum of three bfloat16, so the products are exact
            part = w_tile.to(tl.bfloat16)
            w_tile -= part.to(tl.float32)
            if UPCAST:
                part = part.to(tl.float32)
            z0 = tl.dot(x_tile, part, z0)
        x += 64
        weight += 64
    z1 = tl.load(z1_ptr + column)[None, :].to(tl.float32) + tl.zeros_like(z0)

    # Scores.
    v0 = z0
    v1 = tl.max(tl.where(known, v0, float("-inf")), 1)[:, None]
    v2 = v0 - v1
    v3 = tl.exp(v2)
    v4 = tl.sum(tl.where(known, v3, 0.0), 1)[:, None]
    v5 = v3 / v4
    v6 = v5 + z1

    # The best 8, one after another; the lowest expert among equals.
    key = tl.where(known, _order(v6), -2147483648)
    chosen = tl.zeros((32, 16), tl.int1)
    rank = tl.zeros((32, 16), tl.int32)
    for slot in range(8):
        top = tl.max(key, 1)[:, None]
        at = tl.min(tl.where(key == top, expert[None, :], 16), 1)[:, None]
        hit = expert[None, :] == at
        chosen = chosen | hit
        rank = tl.where(hit, slot, rank)
        key = tl.where(hit, -2147483648, key)

    # Gates; a value of a chosen expert stays in the column of the expert.
    v7 = z0
    v8 = tl.max(tl.where(chosen, v7, float("-inf")), 1)[:, None]
    v9 = v7 - v8
    v10 = tl.exp(v9)
    v11 = tl.sum(tl.where(chosen, v10, 0.0), 1)[:, None]
    v12 = v10 / v11

    write = chosen & exists
    place = token[:, None] * 8 + rank
    tl.store(index_ptr + place, expert.to(tl.int64)[None, :], mask=write)
    tl.store(out0_ptr + place, v12, mask=write)


def launch(x, weight, z1, index, out0, upcast):
    """Write index, out0."""
    tokens = index.shape[0]
    kernel[(triton.cdiv(tokens, 32),)](
        x,
        weight,
        z1,
        index,
        out0,
        x.stride(0),
        tokens,
        UPCAST=upcast,
        num_warps=4,
        num_stages=3,
    )

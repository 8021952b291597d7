"""router_1152x60_top8_bfloat16_e9512f4ce9: logits, scores, choice and gates of every token.

z0 = x @ weight.T; choose 8 by v2 within the best 4 of 10 groups by 2, ties to the lowest expert; then the gates

Made by moefx.codegen; edits are overwritten.
D = 1152, E = 60; 16 tokens per program.
"""

import triton
import triton.language as tl


@triton.jit
def _order(x):
    """Integers in the order of the floats: NaN above all, and zeros of both signs equal, as in a sort."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 2147483647, bits ^ ((bits >> 31) & 2147483647))


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which is the right limit."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _log1p(x):
    """log(1 + x) without cancellation near zero (Kahan)."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * x / (u - 1.0))
    return tl.where(tl.abs(x) < 1.0, near, tl.log(u))


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
    token = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)
    # Every group has a power of two of columns, so that a row can be cut into its groups.
    lane = tl.arange(0, 128)
    expert = lane // 8 * 6 + lane % 8
    # Tokens and experts that do not exist re-read existing ones; nothing of them is stored.
    source = tl.minimum(token, tokens - 1)
    column = tl.minimum(expert, 59)
    exists = (token < tokens)[:, None]
    known = ((lane % 8 < 6) & (expert < 60))[None, :]

    ks = tl.arange(0, 64)
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = weight_ptr + column[None, :] * 1152 + ks[:, None]
    z0 = tl.zeros((16, 128), tl.float32)
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
    v1 = _sigmoid(v0)
    v2 = v1 + z1

    # Every group scores the sum of its 2 highest scores.
    score = tl.where(known, v2, float("-inf"))
    parts = tl.reshape(score, (16, 16, 8))
    free = tl.where(known, _order(score), -2147483648)
    free = tl.reshape(free, (16, 16, 8))
    member = tl.arange(0, 8)[None, None, :]
    total = tl.zeros((16, 16), tl.float32)
    for _ in range(2):
        top = tl.max(free, 2)[:, :, None]
        first = member == tl.min(tl.where(free == top, member, 8), 2)[:, :, None]
        total += tl.sum(tl.where(first, parts, 0.0), 2)
        free = tl.where(first, -2147483648, free)

    # The best 4 groups are eligible; the lowest group among equals.
    group = tl.arange(0, 16)[None, :]
    rest = tl.where(group < 10, _order(total), -2147483648)
    eligible = tl.zeros((16, 16), tl.int1)
    for _ in range(4):
        top = tl.max(rest, 1)[:, None]
        best = group == tl.min(tl.where(rest == top, group, 16), 1)[:, None]
        eligible = eligible | best
        rest = tl.where(best, -2147483648, rest)
    limited = tl.reshape(tl.where(eligible[:, :, None], parts, float("-inf")), (16, 128))

    # The best 8, one after another; the lowest expert among equals.
    key = tl.where(known, _order(limited), -2147483648)
    chosen = tl.zeros((16, 128), tl.int1)
    rank = tl.zeros((16, 128), tl.int32)
    for slot in range(8):
        top = tl.max(key, 1)[:, None]
        at = tl.min(tl.where(key == top, lane[None, :], 128), 1)[:, None]
        hit = lane[None, :] == at
        chosen = chosen | hit
        rank = tl.where(hit, slot, rank)
        key = tl.where(hit, -2147483648, key)

    # Gates; a value of a chosen expert stays in the column of the expert.
    v3 = z0
    v4 = tl.minimum(0.0, v3, propagate_nan=tl.PropagateNan.ALL)
    v5 = tl.abs(v3)
    v6 = -v5
    v7 = tl.exp(v6)
    v8 = _log1p(v7)
    v9 = v4 - v8
    v10 = tl.max(tl.where(chosen, v9, float("-inf")), 1)[:, None]
    v11 = v9 - v10
    v12 = tl.exp(v11)
    v13 = tl.sum(tl.where(chosen, v12, 0.0), 1)[:, None]
    v14 = v12 / v13
    v15 = v14 * 2.5

    write = chosen & exists
    place = token[:, None] * 8 + rank
    tl.store(index_ptr + place, expert.to(tl.int64)[None, :], mask=write)
    tl.store(out0_ptr + place, v15, mask=write)


def launch(x, weight, z1, index, out0, upcast):
    """Write index, out0."""
    tokens = index.shape[0]
    kernel[(triton.cdiv(tokens, 16),)](
        x,
        weight,
        z1,
        index,
        out0,
        x.stride(0),
        tokens,
        UPCAST=upcast,
        num_warps=8,
        num_stages=1,
    )

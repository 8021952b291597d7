"""The text of emitted modules, as jinja2 templates.

Shapes in the emitted code: M rows of one tile, N output columns, K input columns, E experts, R = T * k routed rows.
"""

from __future__ import annotations

HELPERS: dict[str, str] = {
    "sigmoid": '''@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); exp overflows to infinity for very negative x, which is the right limit."""
    return 1.0 / (1.0 + tl.exp(-x))''',
    "tanh": '''@triton.jit
def _tanh(x):
    """2 sigmoid(2x) - 1, and its Taylor series near zero, where that would cancel (relative error below 2e-7)."""
    s = x * x
    series = x + x * s * (-0.33333333 + s * (0.13333333 + s * (-0.053968254 + s * 0.021869488)))
    return tl.where(s < 0.0625, series, 2.0 * _sigmoid(2.0 * x) - 1.0)''',
    "erf": '''@triton.jit
def _erf(x):
    """Error function from two polynomial fits, |x| < 1 and log(erfc) beyond; relative error below 2e-7."""
    s = x * x
    near = 7.85386073e-05
    near = near * s - 0.000801019371
    near = near * s + 0.00518832775
    near = near * s - 0.0268538129
    near = near * s + 0.112835854
    near = near * s - 0.37612626
    near = near * s + 1.12837911
    t = tl.minimum(tl.abs(x), 4.0)  # erf(4) rounds to 1 in float32
    far = 0.000186378355
    far = far * t - 0.00294765062
    far = far * t + 0.0218380336
    far = far * t - 0.103106692
    far = far * t - 0.63814491
    far = far * t - 1.12708914
    far = far * t - 0.00034153185
    tail = 1.0 - tl.exp(far)
    return tl.where(t < 1.0, near * x, tl.where(x < 0.0, -tail, tl.where(x > 0.0, tail, x)))''',
    "expm1": '''@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation near zero (Kahan); large x, where the quotient overflows, takes exp(x) itself."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * x / tl.log(u))
    return tl.where(tl.abs(x) < 1.0, near, u - 1.0)''',
    "log1p": '''@triton.jit
def _log1p(x):
    """log(1 + x) without cancellation near zero (Kahan)."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * x / (u - 1.0))
    return tl.where(tl.abs(x) < 1.0, near, tl.log(u))''',
}

HEADER = '''"""{{ title }}

{{ meaning }}

Made by moefx.codegen; edits are overwritten.
{{ facts }}
"""

import triton
import triton.language as tl
{% for helper in helpers %}


{{ helper }}
{% endfor %}


'''

TILE_MAP = '''@triton.jit
def kernel(
    offsets_ptr,  # int64 [E + 1], first row of each expert, then the first dropped row
    map_ptr,  # int32 [3, TILES]: expert, first row, end row of each tile; -1 beyond the last tile
    experts,
    rows,
    tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUPS: tl.constexpr,  # power of two, at least E + 1
):
    """Find the expert and the rows of every row tile. Group E holds the dropped rows, so that they are written too."""
    group = tl.arange(0, GROUPS)
    start = tl.load(offsets_ptr + group, mask=group <= experts, other=0)
    end = tl.load(offsets_ptr + group + 1, mask=group < experts, other=0)
    end = tl.where(group == experts, rows, end)
    tiles_in_group = tl.where(group <= experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    last_tile = tl.cumsum(tiles_in_group, 0)
    first_tile = last_tile - tiles_in_group

    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mine = (tile[:, None] >= first_tile[None, :]) & (tile[:, None] < last_tile[None, :])
    first_row = start[None, :] + (tile[:, None] - first_tile[None, :]) * BLOCK_M
    exists = tl.sum(mine.to(tl.int32), 1) > 0
    expert = tl.sum(tl.where(mine, group[None, :], 0), 1)
    row = tl.sum(tl.where(mine, first_row, 0), 1)
    row_end = tl.sum(tl.where(mine, end[None, :], 0), 1)
    row_end = tl.minimum(row_end, row + BLOCK_M)
    tl.store(map_ptr + tile, tl.where(exists, expert, -1).to(tl.int32), mask=tile < tiles)
    tl.store(map_ptr + tiles + tile, tl.where(exists, row, -1).to(tl.int32), mask=tile < tiles)
    tl.store(map_ptr + 2 * tiles + tile, tl.where(exists, row_end, -1).to(tl.int32), mask=tile < tiles)


def launch(offsets, tile_map, rows, block_m):
    """Fill ``tile_map`` int32 [3, TILES]; TILES is a bound known to the host, so the device is never waited for."""
    experts, tiles = offsets.shape[0] - 1, tile_map.shape[1]
    groups, block_t = triton.next_power_of_2(experts + 1), 64
    kernel[(triton.cdiv(tiles, block_t),)](
        offsets, tile_map, experts, rows, tiles, BLOCK_M=block_m, BLOCK_T=block_t, GROUPS=groups, num_warps=4
    )
'''

COMBINE = '''@triton.jit
def invert(order_ptr, position_ptr, rows, BLOCK: tl.constexpr):
    """position[order[r]] = r: where the row of each (token, slot) pair lies."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(order_ptr + row, mask=row < rows, other=0)
    tl.store(position_ptr + slot, row, mask=row < rows)


@triton.jit
def kernel(
    rows_ptr,  # {{ dtype }} [R, D]
    position_ptr,  # int64 [T * k]
{% if weighted %}
    weights_ptr,  # float32 [T, k], contiguous
{% endif %}
{% for kind in operands %}
    z{{ loop.index }}_ptr,  # {{ dtype }} {{ {"row": "[T, D]", "sample": "[B, D]", "column": "[D]"}[kind] }}, contiguous
{% endfor %}
    out_ptr,  # {{ dtype }} [T, D]
{% if keep %}
    kept_ptr,  # {{ dtype }} [T, D], the sum alone
{% endif %}
{% if "sample" in operands %}
    sample_tokens,  # T / B
{% endif %}
):
    """One token and {{ block_n }} columns: slots are added in order, so the result does not depend on scheduling."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * {{ block_n }} + tl.arange(0, {{ block_n }})
    total = tl.zeros(({{ block_n }},), tl.float32)
    for slot in tl.static_range({{ top_k }}):
        position = tl.load(position_ptr + token * {{ top_k }} + slot)
{% if weighted %}
        weight = tl.load(weights_ptr + token * {{ top_k }} + slot)
{% endif %}
{% if mask_n %}
        row = tl.load(rows_ptr + position * {{ n }} + col, mask=col < {{ n }}, other=0.0)
{% else %}
        row = tl.load(rows_ptr + position * {{ n }} + col)
{% endif %}
        total += {{ "weight * " if weighted }}row.to(tl.float32)
{% if keep %}
    kept = kept_ptr + token * {{ n }} + col
    tl.store(kept, total.to(kept_ptr.dtype.element_ty){{ ", mask=col < %d" % n if mask_n }})
{% endif %}
{% if operands %}

    # What follows in the model, in float32.
    z0 = total
{% for load in loads %}
    {{ load }}
{% endfor %}
{% for statement in statements %}
    {{ statement }}
{% endfor %}
    total = {{ result }}
{% endif %}
{% if mask_n %}
    tl.store(out_ptr + token * {{ n }} + col, total.to(out_ptr.dtype.element_ty), mask=col < {{ n }})
{% else %}
    tl.store(out_ptr + token * {{ n }} + col, total.to(out_ptr.dtype.element_ty))
{% endif %}


{{ signature }}
    """Write ``out``{{ kept_too }} [T, D]; ``position`` int64 [T * k] is scratch, or given where ``order`` is None."""
    if order is not None:
        invert[(triton.cdiv(order.shape[0], 1024),)](order, position, order.shape[0], BLOCK=1024)
{% if "sample" in operands %}
    sample_tokens = out.shape[0] // z{{ operands.index("sample") + 1 }}.shape[0]
{% endif %}
{{ start }}
'''

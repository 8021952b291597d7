"""The text of grouped projections that gather rows by pointers, and the parts that every projection's module shares.

Shapes in the emitted code: M rows of one tile, N output columns, K input columns, E experts, R = T * k routed rows.
"""

from __future__ import annotations

#: Text that templates include by name.
PARTS: dict[str, str] = {
    "weights": """{% for name in weight_names %}
    {{ name }}_ptr,  # {{ dtype }} [E, {{ weight_rows }}, K], contiguous
{% endfor %}
""",
    "biases": """{% for name in bias_names %}
    {{ name }}_ptr,  # {{ dtype }} [E, {{ weight_rows }}]
{% endfor %}
""",
    "tiles": """{% if reads_order %}
    order_ptr,  # int64 [R]
{% endif %}
    map_ptr,  # int32 [3, TILES], see the tile map kernel
""",
    "results": """    out_ptr,  # {{ dtype }} [R, N]
{% if keep %}
    kept_ptr,  # {{ dtype }} [R, {{ halves * n }}], what goes into the epilogue
{% endif %}
""",
    "passed": """        out,
{% if keep %}
        kept,
{% endif %}
""",
    # Where a tile of results lies, and zeros where it belongs to no expert.
    "place": """    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, {{ block_m }})
    col = tile_n * {{ block_n }} + tl.arange(0, {{ block_n }})
    out = out_ptr + row.to(tl.int64)[:, None] * {{ n }} + col[None, :]
    keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % n if mask_n else "(row < row_end)[:, None]" }}
    if expert == experts:  # dropped rows are zero, and always written
        tl.store(out, tl.zeros(({{ block_m }}, {{ block_n }}), out_ptr.dtype.element_ty), mask=keep)
{% if keep %}
        nothing = tl.zeros(({{ block_m }}, {{ block_n }}), kept_ptr.dtype.element_ty)
        kept = kept_ptr + row.to(tl.int64)[:, None] * {{ halves * n }} + col[None, :]
{% for half in range(halves) %}
        tl.store(kept{{ " + %d" % (half * n) if half }}, nothing, mask=keep)
{% endfor %}
{% endif %}
        return
""",
    "weight_row": """{% if mask_n %}
    weight_row = tl.minimum(col, {{ n - 1 }})
{% else %}
    weight_row = col
{% endif %}
""",
    # From products to results.
    "finish": """{% if bias_names %}
    bias = expert * {{ weight_rows }} + weight_row
{% for half in range(halves) %}
    b{{ half }} = tl.load({{ bias_bases[half] }})
    z{{ half }} += b{{ half }}.to(tl.float32)[None, :]
{% endfor %}
{% endif %}
{% if keep %}
    kept = kept_ptr + row.to(tl.int64)[:, None] * {{ halves * n }} + col[None, :]
{% for half in range(halves) %}
    tl.store(kept{{ " + %d" % (half * n) if half }}, z{{ half }}.to(kept_ptr.dtype.element_ty), mask=keep)
{% endfor %}
{% endif %}
{% if statements %}

    # Epilogue, in float32.
{% for statement in statements %}
    {{ statement }}
{% endfor %}
{% endif %}
    tl.store(out, {{ result }}.to(out_ptr.dtype.element_ty), mask=keep)
""",
}

GROUPED_LINEAR = '''@triton.jit
def kernel(
    x_ptr,  # {{ dtype }} {{ "[T, K]" if gather else "[R, K]" }}
{% include "weights" %}
{% if parts == 1 %}
{% include "biases" %}
{% endif %}
{% include "tiles" %}
{% if parts == 1 %}
{% include "results" %}
{% else %}
    partial_ptr,  # float32 [{{ parts * halves }}, R, N], the products of each part of K
    rows,
{% endif %}
    x_stride,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Programs that run together share {{ group_m }} row tiles, which stay in the L2 cache while the weights stream by.
    pid = tl.program_id(0)
    group = pid // ({{ group_m }} * {{ column_tiles }})
    first = group * {{ group_m }}
    height = tl.minimum(tiles - first, {{ group_m }})
    tile_m = first + pid % ({{ group_m }} * {{ column_tiles }}) % height
    tile_n = pid % ({{ group_m }} * {{ column_tiles }}) // height

    expert = tl.load(map_ptr + tile_m)
{% if parts == 1 %}
    if expert < 0:
        return
{% include "place" %}
{% else %}
    if (expert < 0) | (expert == experts):  # no rows, or dropped ones, which are zero without products
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, {{ block_m }})
    col = tile_n * {{ block_n }} + tl.arange(0, {{ block_n }})
{% endif %}

    # Rows past the end of the group re-read its first row: finite data, no predicate in the loop, masked when stored.
    source = tl.where(row < row_end, row, row_start).to(tl.int64)
{% if gather %}
    source = tl.load(order_ptr + source){{ " // %d" % top_k if top_k > 1 else "" }}
{% endif %}
{% include "weight_row" %}
{% if parts > 1 %}
    part = tl.program_id(1)
    ks = part * {{ reach }} + tl.arange(0, {{ block_k }})
{% else %}
    ks = tl.arange(0, {{ block_k }})
{% endif %}
    x = x_ptr + source[:, None] * x_stride + ks[None, :]
    weight = expert.to(tl.int64) * {{ weight_rows * k }}
    weight_tile = {{ weight_tile }}
{% for half in range(halves) %}
    w{{ half }} = {{ weight_bases[half] }} + weight_tile
    z{{ half }} = tl.zeros(({{ z_shape }}), tl.float32)
{% endfor %}
    for {{ "k0" if mask_k else "_" }} in range(0, {{ reach }}, {{ block_k }}):
{% if mask_k %}
        x_tile = tl.load(x, mask=(ks < {{ k }} - k0)[None, :], other=0.0)
{% else %}
        x_tile = tl.load(x)
{% endif %}
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
{% for half in range(halves) %}
{% if mask_k %}
        w{{ half }}_tile = tl.load(w{{ half }}, mask=(ks < {{ k }} - k0){{ weight_axis }}, other=0.0{{ once }})
{% else %}
        w{{ half }}_tile = tl.load(w{{ half }}{{ once }})
{% endif %}
        if UPCAST:
            w{{ half }}_tile = w{{ half }}_tile.to(tl.float32)
{% if swapped %}
        z{{ half }} = tl.dot(w{{ half }}_tile, tl.trans(x_tile), z{{ half }}{{ precision }})
{% else %}
        z{{ half }} = tl.dot(x_tile, w{{ half }}_tile, z{{ half }}{{ precision }})
{% endif %}
        w{{ half }} += {{ block_k }}
{% endfor %}
        x += {{ block_k }}
{% if swapped %}
{% for half in range(halves) %}
    z{{ half }} = tl.trans(z{{ half }})
{% endfor %}
{% endif %}
{% if parts == 1 %}
{% include "finish" %}
{% else %}
    keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % n if mask_n else "(row < row_end)[:, None]" }}
{% for half in range(halves) %}
    at = ({{ planes[half] }} * rows + row).to(tl.int64)[:, None] * {{ n }}
    tl.store(partial_ptr + at + col[None, :], z{{ half }}, mask=keep)
{% endfor %}


@triton.jit
def reduce(
    partial_ptr,  # float32 [{{ parts * halves }}, R, N]
{% include "biases" %}
    map_ptr,  # int32 [3, TILES], see the tile map kernel
{% include "results" %}
    rows,
    experts,
    tiles,
):
    """Add the parts of K, always in the same order."""
    tile_m = tl.program_id(0)
    tile_n = tl.program_id(1)
    expert = tl.load(map_ptr + tile_m)
    if expert < 0:
        return
{% include "place" %}
{% if bias_names %}
{% include "weight_row" %}
{% endif %}
{% for half in range(halves) %}
    z{{ half }} = tl.zeros(({{ block_m }}, {{ block_n }}), tl.float32)
{% endfor %}
    for part in tl.static_range({{ parts }}):
{% for half in range(halves) %}
        at = ({{ planes[half] }} * rows + row).to(tl.int64)[:, None] * {{ n }}
        z{{ half }} += tl.load(partial_ptr + at + col[None, :], mask=keep, other=0.0)
{% endfor %}
{% include "finish" %}
{% endif %}


{{ signature }}
    """Write ``out`` [R, N]{{ " and ``kept``" if keep }}{{ "; ``partial`` is scratch" if parts > 1 }}."""
    tiles = tile_map.shape[1]
    kernel[(tiles * {{ column_tiles }},{{ " %d" % parts if parts > 1 }})](
        x,
{% for name in weight_names + (bias_names if parts == 1 else []) %}
        {{ name }},
{% endfor %}
{% if reads_order %}
        order,
{% endif %}
        tile_map,
{% if parts == 1 %}
{% include "passed" %}
{% else %}
        partial,
        out.shape[0],
{% endif %}
        x.stride(0),
        {{ weight_names[0] }}.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
{% if parts > 1 %}
    reduce[(tiles, {{ column_tiles }})](
        partial,
{% for name in bias_names %}
        {{ name }},
{% endfor %}
        tile_map,
{% include "passed" %}
        out.shape[0],
        {{ weight_names[0] }}.shape[0],
        tiles,
        num_warps=4,
    )
{% endif %}
'''

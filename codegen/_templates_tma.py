"""The text of emitted modules that load their operands through tensor descriptors, as jinja2 templates.

Shapes in the emitted code: M rows of one tile, N output columns, K input columns, E experts, R = T * k routed rows.
"""

from __future__ import annotations

TMA_LINEAR = '''{% if permute_columns %}
@triton.jit
def permute(x_ptr, order_ptr, sorted_ptr, rows, x_stride, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """sorted[r] = x[order[r]{{ " // %d" % top_k if top_k > 1 else "" }}], so that one instruction copies a tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = tl.load(order_ptr + row, mask=row < rows, other=0){{ " // %d" % top_k if top_k > 1 else "" }}
    col = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (col < {{ k }})[None, :]
    values = tl.load(x_ptr + source[:, None] * x_stride + col[None, :], mask=mask)
    tl.store(sorted_ptr + row[:, None] * {{ k }} + col[None, :], values, mask=mask)


{% endif %}
@triton.jit
def kernel(
    x_ptr,  # {{ dtype }} {{ "[T, K]" if descriptor_gather else "[R, K]" }}
{% include "weights" %}
{% include "biases" %}
{% include "tiles" %}
{% include "results" %}
    x_stride,
{% if descriptor_gather %}
    tokens,
{% endif %}
    rows,
    experts,
    tiles,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    # Coordinates past the end read zeros; rows of a neighbouring expert are finite data that no store writes.
    x_desc = tl.make_tensor_descriptor(
        x_ptr,
        shape=[{{ "tokens" if descriptor_gather else "rows" }}, {{ k }}],
        strides=[x_stride, 1],
        block_shape=[{{ 1 if descriptor_gather else block_m }}, {{ block_k }}],
    )
{% for name in weight_names %}
    {{ name }}_desc = tl.make_tensor_descriptor(
        {{ name }}_ptr,
        shape=[experts * {{ weight_rows }}, {{ k }}],
        strides=[{{ k }}, 1],
        block_shape=[{{ block_n }}, {{ block_k }}],
    )
{% endfor %}

    # The map is padded to a bound that the host knows; how many tiles there are is counted here.
    valid = 0
    for start in range(0, tiles, 1024):
        tile = start + tl.arange(0, 1024)
        valid += tl.sum((tl.load(map_ptr + tile, mask=tile < tiles, other=-1) >= 0).to(tl.int32))

    # A program walks over tiles; those that run together share {{ group_m }} row tiles, which stay in the L2 cache.
    for tile in tl.range(
        tl.program_id(0),
        valid * {{ column_tiles }},
        tl.num_programs(0),
        flatten={{ flatten }},
        warp_specialize={{ warp_specialize }},
    ):
        group = tile // ({{ group_m }} * {{ column_tiles }})
        first = group * {{ group_m }}
        height = tl.minimum(valid - first, {{ group_m }})
        tile_m = first + tile % ({{ group_m }} * {{ column_tiles }}) % height
        tile_n = tile % ({{ group_m }} * {{ column_tiles }}) // height
        expert = tl.load(map_ptr + tile_m)
        row_start = tl.load(map_ptr + tiles + tile_m)
        row_end = tl.load(map_ptr + 2 * tiles + tile_m)
        # Dropped rows (expert E) are multiplied by the last expert and then written as zero: a loop that divides roles
        # between warps may not branch.
        weight_row = tl.minimum(expert, experts - 1) * {{ weight_rows }} + tile_n * {{ block_n }}
        row = row_start + tl.arange(0, {{ block_m }})
{% if descriptor_gather %}
        source = tl.load(order_ptr + tl.minimum(row, rows - 1)){{ " // %d" % top_k if top_k > 1 else "" }}
{% endif %}

{% for half in range(halves) %}
        z{{ half }} = tl.zeros(({{ block_m }}, {{ block_n }}), tl.float32)
{% endfor %}
        for k0 in range(0, {{ k }}, {{ block_k }}):
            x_tile = x_desc.{{ "gather(source.to(tl.int32), k0)" if descriptor_gather else "load([row_start, k0])" }}
            if UPCAST:
                x_tile = x_tile.to(tl.float32)
{% for half in range(halves) %}
            w{{ half }}_tile = {{ weight_loads[half] }}
            if UPCAST:
                w{{ half }}_tile = w{{ half }}_tile.to(tl.float32)
            z{{ half }} = tl.dot(x_tile, w{{ half }}_tile.T, z{{ half }})
{% endfor %}

        col = tile_n * {{ block_n }} + tl.arange(0, {{ block_n }})
{% if bias_names %}
{% if mask_n %}
        bias = weight_row + tl.minimum(col, {{ n - 1 }}) - tile_n * {{ block_n }}
{% else %}
        bias = weight_row + tl.arange(0, {{ block_n }})
{% endif %}
{% for half in range(halves) %}
        z{{ half }} += tl.load({{ bias_bases[half] }}).to(tl.float32)[None, :]
{% endfor %}
{% endif %}
        keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % n if mask_n else "(row < row_end)[:, None]" }}
{% if keep %}
        kept = kept_ptr + row.to(tl.int64)[:, None] * {{ halves * n }} + col[None, :]
{% for half in range(halves) %}
        product{{ half }} = tl.where(expert < experts, z{{ half }}, 0.0)
        tl.store(kept{{ " + %d" % (half * n) if half }}, product{{ half }}.to(kept_ptr.dtype.element_ty), mask=keep)
{% endfor %}
{% endif %}
{% if statements %}
        # Epilogue, in float32.
{% for statement in statements %}
        {{ statement }}
{% endfor %}
{% endif %}
        result = tl.where(expert < experts, {{ result }}, 0.0)
        out = out_ptr + row.to(tl.int64)[:, None] * {{ n }} + col[None, :]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=keep)


def aligned(tensor):
    """Copy a tensor whose rows do not start at multiples of 16 bytes, as descriptors want them."""
    if tensor.stride(0) * {{ item_bytes }} % 16:
        tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


{{ signature }}
    """Write ``out`` [R, N]{{ " and ``kept``" if keep }}."""
    rows, tiles = out.shape[0], tile_map.shape[1]
{% if permute_columns %}
    permuted = x.new_empty((rows, {{ k }}))
    grid = (triton.cdiv(rows, 8), triton.cdiv({{ k }}, {{ permute_columns }}))
    permute[grid](x, order, permuted, rows, x.stride(0), BLOCK_R=8, BLOCK_K={{ permute_columns }})
    x = permuted
{% else %}
    x = aligned(x)
{% endif %}
    # Descriptors live in scratch memory; the stream orders its next use after this launch.
    triton.set_allocator(lambda size, alignment, stream: tile_map.new_empty((size // 4 + 1,)))
    kernel[(min(tiles * {{ column_tiles }}, {{ programs }}),)](
        x,
{% for name in weight_names %}
        aligned({{ name }}),
{% endfor %}
{% for name in bias_names %}
        {{ name }},
{% endfor %}
{% if reads_order %}
        order,
{% endif %}
        tile_map,
{% include "passed" %}
        x.stride(0),
{% if descriptor_gather %}
        x.shape[0],
{% endif %}
        rows,
        {{ weight_names[0] }}.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''

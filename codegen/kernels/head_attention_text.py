"""The text of the kernels of routed-head attention, as jinja2 templates.

Shapes in the emitted code: B samples, N queries, M keys, R = B * N * H rows, G = B * H groups.
"""

from __future__ import annotations

#: The tensors that ``launch`` takes and passes on, by stage.
TENSORS = {
    "forward": ["q", "k", "v", "gates", "order", "tile_map", "out", "lse"],
    "queries": ["q", "k", "v", "gates", "order", "tile_map", "grad", "out", "lse", "dq", "dgates", "delta"],
    "keys": ["q", "k", "v", "gates", "order", "offsets", "grad", "lse", "delta", "dk", "dv"],
}

_TILE = """    tile = tl.program_id(0)
    group = tl.load(map_ptr + tile)
    if group < 0:
        return
    row_start = tl.load(map_ptr + tiles + tile)
    row_end = tl.load(map_ptr + 2 * tiles + tile)
    row = row_start + tl.arange(0, {{ block_m }})
    mine = row < row_end
    slot = tl.load(order_ptr + tl.where(mine, row, row_start))
"""

_ADDRESSES = """    # Rows of a group lie {{ heads * d }} values apart, starting at its sample and head.
    first_key = (group // {{ heads }}).to(tl.int64) * keys * {{ heads * d }} + group % {{ heads }} * {{ d }}
"""

_FORWARD_HEAD = """@triton.jit
def kernel(
    q_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}], contiguous
    k_ptr,  # {{ dtype }} [B, M, {{ heads }}, {{ d }}], contiguous
    v_ptr,  # {{ dtype }} [B, M, {{ heads }}, {{ d }}], contiguous
    gates_ptr,  # float32 [B, N, {{ heads }}]
    order_ptr,  # int64 [R], rows by sample and head; those of zero gates last
"""

FORWARD = (
    _FORWARD_HEAD
    + """    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}]
    lse_ptr,  # float32 [R]
    groups,
    keys,
    tiles,
    scale,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
"""
    + _TILE
    + """{% for p, start, size, padded in parts %}
    c{{ p }} = {{ "%d + " % start if start }}tl.arange(0, {{ size }})
    in{{ p }} = {{ "mine[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "mine[:, None]" }}
{% endfor %}
    if group == groups:  # heads not chosen are zero, and always written
{% for p, start, size, padded in parts %}
        nothing = tl.zeros(({{ block_m }}, {{ size }}), out_ptr.dtype.element_ty)
        tl.store(out_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], nothing, mask=in{{ p }})
{% endfor %}
        tl.store(lse_ptr + slot, tl.zeros(({{ block_m }},), tl.float32), mask=mine)
        return
"""
    + _ADDRESSES
    + '''{% for p, start, size, padded in parts %}
    q{{ p }} = tl.load(q_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], mask=in{{ p }}, other=0.0)
    if UPCAST:
        q{{ p }} = q{{ p }}.to(tl.float32)
    o{{ p }} = tl.zeros(({{ block_m }}, {{ size }}), tl.float32)
{% endfor %}
    # Softmax as it goes, in powers of two: the largest logit so far, and the sum of weights relative to it.
    top = tl.full(({{ block_m }},), float("-inf"), tl.float32)
    total = tl.zeros(({{ block_m }},), tl.float32)
    for key0 in range(0, keys, {{ block_n }}):
        key = key0 + tl.arange(0, {{ block_n }})
        exists = key < keys
        at = first_key + key.to(tl.int64)[:, None] * {{ heads * d }}
        logits = tl.zeros(({{ block_m }}, {{ block_n }}), tl.float32)
{% for p, start, size, padded in parts %}
        here = {{ "exists[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "exists[:, None]" }}
        k = tl.load(k_ptr + at + c{{ p }}[None, :], mask=here, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        logits = tl.dot(q{{ p }}, tl.trans(k), logits{{ precision }})
{% endfor %}
        logits = tl.where(exists[None, :], logits * (scale * 1.4426950408889634), float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - higher)
        weights = tl.exp2(logits - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        top = higher
{% for p, start, size, padded in parts %}
        here = {{ "exists[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "exists[:, None]" }}
        v = tl.load(v_ptr + at + c{{ p }}[None, :], mask=here, other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        o{{ p }} = tl.dot(weights.to(v.dtype), v, o{{ p }} * shrink[:, None]{{ precision }})
{% endfor %}
    factor = tl.load(gates_ptr + slot) / total
    tl.store(lse_ptr + slot, top + tl.log2(total), mask=mine)
{% for p, start, size, padded in parts %}
    o{{ p }} = (o{{ p }} * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], o{{ p }}, mask=in{{ p }})
{% endfor %}


def launch({{ tensors | join(", ") }}, scale, upcast):
    """Write ``out`` and ``lse`` (in powers of two)."""
    tiles = tile_map.shape[1]
    kernel[(tiles,)](
{% for name in tensors %}
        {{ name }},
{% endfor %}
        q.shape[0] * {{ heads }},
        k.shape[1],
        tiles,
        scale,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''
)

QUERIES = (
    _FORWARD_HEAD
    + """    map_ptr,  # int32 [3, TILES], see the tile map kernel
    grad_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}], contiguous
    out_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}], the forward result
    lse_ptr,  # float32 [R]
    dq_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}]
    dgates_ptr,  # float32 [R]
    delta_ptr,  # float32 [R], the product of result and gradient, which the keys' kernel reads
    groups,
    keys,
    tiles,
    scale,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
"""
    + _TILE
    + """{% for p, start, size, padded in parts %}
    c{{ p }} = {{ "%d + " % start if start }}tl.arange(0, {{ size }})
    in{{ p }} = {{ "mine[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "mine[:, None]" }}
{% endfor %}
    if group == groups:  # heads not chosen have no gradient, and that is always written
{% for p, start, size, padded in parts %}
        nothing = tl.zeros(({{ block_m }}, {{ size }}), dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], nothing, mask=in{{ p }})
{% endfor %}
        tl.store(dgates_ptr + slot, tl.zeros(({{ block_m }},), tl.float32), mask=mine)
        tl.store(delta_ptr + slot, tl.zeros(({{ block_m }},), tl.float32), mask=mine)
        return
"""
    + _ADDRESSES
    + '''    gate = tl.load(gates_ptr + slot)
    lse = tl.load(lse_ptr + slot)
    delta = tl.zeros(({{ block_m }},), tl.float32)
{% for p, start, size, padded in parts %}
    at = slot[:, None] * {{ d }} + c{{ p }}[None, :]
    q{{ p }} = tl.load(q_ptr + at, mask=in{{ p }}, other=0.0)
    g{{ p }} = tl.load(grad_ptr + at, mask=in{{ p }}, other=0.0)
    out = tl.load(out_ptr + at, mask=in{{ p }}, other=0.0).to(tl.float32)
    delta += tl.sum(out * g{{ p }}.to(tl.float32), 1)
    if UPCAST:
        q{{ p }} = q{{ p }}.to(tl.float32)
        g{{ p }} = g{{ p }}.to(tl.float32)
    dq{{ p }} = tl.zeros(({{ block_m }}, {{ size }}), tl.float32)
{% endfor %}
    tl.store(delta_ptr + slot, delta, mask=mine)
    tl.store(dgates_ptr + slot, delta / gate, mask=mine)
    for key0 in range(0, keys, {{ block_n }}):
        key = key0 + tl.arange(0, {{ block_n }})
        exists = key < keys
        key_at = first_key + key.to(tl.int64)[:, None] * {{ heads * d }}
        logits = tl.zeros(({{ block_m }}, {{ block_n }}), tl.float32)
        dots = tl.zeros(({{ block_m }}, {{ block_n }}), tl.float32)
{% for p, start, size, padded in parts %}
        here = {{ "exists[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "exists[:, None]" }}
        k{{ p }} = tl.load(k_ptr + key_at + c{{ p }}[None, :], mask=here, other=0.0)
        v = tl.load(v_ptr + key_at + c{{ p }}[None, :], mask=here, other=0.0)
        if UPCAST:
            k{{ p }} = k{{ p }}.to(tl.float32)
            v = v.to(tl.float32)
        logits = tl.dot(q{{ p }}, tl.trans(k{{ p }}), logits{{ precision }})
        dots = tl.dot(g{{ p }}, tl.trans(v), dots{{ precision }})
{% endfor %}
        weights = tl.exp2(logits * (scale * 1.4426950408889634) - lse[:, None])
        weights = tl.where(exists[None, :], weights, 0.0)
        ds = weights * (dots * gate[:, None] - delta[:, None]) * scale
{% for p, start, size, padded in parts %}
        dq{{ p }} = tl.dot(ds.to(k{{ p }}.dtype), k{{ p }}, dq{{ p }}{{ precision }})
{% endfor %}
{% for p, start, size, padded in parts %}
    dq{{ p }} = dq{{ p }}.to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], dq{{ p }}, mask=in{{ p }})
{% endfor %}


def launch({{ tensors | join(", ") }}, scale, upcast):
    """Write ``dq``, ``dgates`` and ``delta``."""
    tiles = tile_map.shape[1]
    kernel[(tiles,)](
{% for name in tensors %}
        {{ name }},
{% endfor %}
        q.shape[0] * {{ heads }},
        k.shape[1],
        tiles,
        scale,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''
)

KEYS = (
    _FORWARD_HEAD
    + """    offsets_ptr,  # int64 [G + 1], first row of each sample and head
    grad_ptr,  # {{ dtype }} [B, N, {{ heads }}, {{ d }}], contiguous
    lse_ptr,  # float32 [R]
    delta_ptr,  # float32 [R]
    dk_ptr,  # {{ dtype }} [B, M, {{ heads }}, {{ d }}]
    dv_ptr,  # {{ dtype }} [B, M, {{ heads }}, {{ d }}]
    keys,
    key_tiles,
    scale,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    group = tl.program_id(0) // key_tiles
    key = tl.program_id(0) % key_tiles * {{ block_n }} + tl.arange(0, {{ block_n }})
    exists = key < keys
    start = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
"""
    + _ADDRESSES
    + '''    at = first_key + key.to(tl.int64)[:, None] * {{ heads * d }}
{% for p, start, size, padded in parts %}
    c{{ p }} = {{ "%d + " % start if start }}tl.arange(0, {{ size }})
    in{{ p }} = {{ "exists[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "exists[:, None]" }}
    k{{ p }} = tl.load(k_ptr + at + c{{ p }}[None, :], mask=in{{ p }}, other=0.0)
    v{{ p }} = tl.load(v_ptr + at + c{{ p }}[None, :], mask=in{{ p }}, other=0.0)
    if UPCAST:
        k{{ p }} = k{{ p }}.to(tl.float32)
        v{{ p }} = v{{ p }}.to(tl.float32)
    dk{{ p }} = tl.zeros(({{ block_n }}, {{ size }}), tl.float32)
    dv{{ p }} = tl.zeros(({{ block_n }}, {{ size }}), tl.float32)
{% endfor %}
    for row0 in range(start, end, {{ block_m }}):
        row = row0 + tl.arange(0, {{ block_m }})
        mine = row < end
        slot = tl.load(order_ptr + row, mask=mine, other=0)
        gate = tl.load(gates_ptr + slot, mask=mine, other=0.0)
        lse = tl.load(lse_ptr + slot, mask=mine, other=0.0)
        delta = tl.load(delta_ptr + slot, mask=mine, other=0.0)
        logits = tl.zeros(({{ block_n }}, {{ block_m }}), tl.float32)
        dots = tl.zeros(({{ block_n }}, {{ block_m }}), tl.float32)
{% for p, start, size, padded in parts %}
        here = {{ "mine[:, None] & (c%d < %d)[None, :]" % (p, d) if padded else "mine[:, None]" }}
        q{{ p }} = tl.load(q_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], mask=here, other=0.0)
        g{{ p }} = tl.load(grad_ptr + slot[:, None] * {{ d }} + c{{ p }}[None, :], mask=here, other=0.0)
        if UPCAST:
            q{{ p }} = q{{ p }}.to(tl.float32)
            g{{ p }} = g{{ p }}.to(tl.float32)
        logits = tl.dot(k{{ p }}, tl.trans(q{{ p }}), logits{{ precision }})
        dots = tl.dot(v{{ p }}, tl.trans(g{{ p }}), dots{{ precision }})
{% endfor %}
        weights = tl.exp2(logits * (scale * 1.4426950408889634) - lse[None, :])
        weights = tl.where(mine[None, :], weights, 0.0)
        ds = weights * (dots * gate[None, :] - delta[None, :]) * scale
        weights *= gate[None, :]
{% for p, start, size, padded in parts %}
        dv{{ p }} = tl.dot(weights.to(g{{ p }}.dtype), g{{ p }}, dv{{ p }}{{ precision }})
        dk{{ p }} = tl.dot(ds.to(q{{ p }}.dtype), q{{ p }}, dk{{ p }}{{ precision }})
{% endfor %}
{% for p, start, size, padded in parts %}
    tl.store(dk_ptr + at + c{{ p }}[None, :], dk{{ p }}.to(dk_ptr.dtype.element_ty), mask=in{{ p }})
    tl.store(dv_ptr + at + c{{ p }}[None, :], dv{{ p }}.to(dv_ptr.dtype.element_ty), mask=in{{ p }})
{% endfor %}


def launch({{ tensors | join(", ") }}, scale, upcast):
    """Write ``dk`` and ``dv``."""
    key_tiles = triton.cdiv(k.shape[1], {{ block_n }})
    kernel[(k.shape[0] * {{ heads }} * key_tiles,)](
{% for name in tensors %}
        {{ name }},
{% endfor %}
        k.shape[1],
        key_tiles,
        scale,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''
)

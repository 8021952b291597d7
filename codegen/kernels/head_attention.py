"""Attention in which a query computes only the heads it chose: forward, and the two kernels of its gradient.

Queries are sorted by (sample, head) as routed rows are by expert, and cut into the same tiles.  Keys and values stay
where they are.  A head width that is no power of two is cut into parts that are (72 = 64 + 8, of which 8 is padded to
16), which wastes less than padding the whole to 128.

Shapes in the emitted code: B samples, N queries, M keys, H heads, D head width, R = B * N * H rows, G = B * H groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, TRITON_TYPES, Kernel, digest, require_dtype
from moefx.codegen.targets import Target


def parts_of(width: int) -> list[tuple[int, int, bool]]:
    """Return (start, power of two, whether it is padded) of the parts that a head is cut into."""
    found, start = [], 0
    while start < width:
        size = max(16, 1 << ((width - start).bit_length() - 1))
        found.append((start, size, start + size > width))
        start += size
    return found


@dataclass(frozen=True)
class HeadAttentionSpec(Kernel):
    """``out[r] = gate[r] * softmax(q[r] @ k[group].T * scale) @ v[group]``, and its gradients; zero gates are no rows.

    ``stage`` is ``forward``, ``queries`` (gradients of queries and gates) or ``keys`` (of keys and values). Sums run in
    one order, and every result is written, so repeated runs give the same bits.
    """

    width: int
    heads: int
    dtype: str
    stage: str = "forward"
    precision: str = "ieee"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"head_attention {self.stage} D={self.width} H={self.heads} dtype={self.dtype} {self.precision}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"head_attention_{self.stage}_{self.heads}x{self.width}_{self.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: rows of queries and of keys; the accumulators of a whole head stay in registers."""
        if target.is_interpreter:
            return Schedule(block_m, 32, 16, 1, 1, 1)
        wide, single = self.width > 64, ITEM_BYTES[self.dtype] == 4
        # Without wide tensor-core instructions operands take registers too.
        small = wide and not target.has_tma
        if self.stage == "keys":
            return Schedule(16 if small else 32, 32 if single or small else 64, 16, 8 if wide else 4, 1, 1)
        if single or self.stage == "queries":
            return Schedule(min(block_m, 64), 32, 16, 8 if wide else 4, 1, 1)
        return Schedule(min(block_m, 64) if small else block_m, 64, 16, 8, 2, 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        meaning = {
            "forward": "out[r] = gate[r] * softmax(q[r] @ k.T * scale) @ v over the keys of the row's sample and head",
            "queries": "dq[r] and dgate[r], by recomputing the weights from the stored logarithm of their sum",
            "keys": "dk and dv of every key, summed over the rows of its sample and head",
        }[self.stage]
        return render(
            {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}[self.stage],
            title=f"{self.name}: attention in which every query chooses its heads.",
            meaning=meaning,
            facts=f"D = {self.width}, H = {self.heads}; {schedule.block_m} queries by {schedule.block_n} keys.",
            helpers=[],
            dtype=self.dtype,
            d=self.width,
            heads=self.heads,
            parts=[(p, *part) for p, part in enumerate(parts_of(self.width))],
            block_m=schedule.block_m,
            block_n=schedule.block_n,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            precision=f', input_precision="{self.precision}"' if self.dtype == "float32" else "",
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, keys = TRITON_TYPES[self.dtype], 1022
        q = [item, [2, rows, self.heads, self.width]]
        k = [item, [2, keys, self.heads, self.width]]
        flat = 2 * rows * self.heads
        plain: list[Any] = [q, k, k, ["fp32", [2, rows, self.heads]], ["i64", [flat]]]
        groups, lse = ["i64", [2 * self.heads + 1]], ["fp32", [flat]]
        tile_map = ["i32", [3, tiles]]
        if self.stage == "forward":
            return [*plain, tile_map, q, lse, 0.125, False]
        if self.stage == "queries":
            return [*plain, tile_map, q, q, lse, q, lse, lse, 0.125, False]
        return [*plain, groups, q, lse, lse, k, k, 0.125, False]


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


def launch(q, k, v, gates, order, tile_map, out, lse, scale, upcast):
    """Write ``out`` and ``lse`` (in powers of two)."""
    tiles = tile_map.shape[1]
    kernel[(tiles,)](
        q,
        k,
        v,
        gates,
        order,
        tile_map,
        out,
        lse,
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


def launch(q, k, v, gates, order, tile_map, grad, out, lse, dq, dgates, delta, scale, upcast):
    """Write ``dq``, ``dgates`` and ``delta``."""
    tiles = tile_map.shape[1]
    kernel[(tiles,)](
        q,
        k,
        v,
        gates,
        order,
        tile_map,
        grad,
        out,
        lse,
        dq,
        dgates,
        delta,
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


def launch(q, k, v, gates, order, offsets, grad, lse, delta, dk, dv, scale, upcast):
    """Write ``dk`` and ``dv``."""
    key_tiles = triton.cdiv(k.shape[1], {{ block_n }})
    kernel[(k.shape[0] * {{ heads }} * key_tiles,)](
        q,
        k,
        v,
        gates,
        order,
        offsets,
        grad,
        lse,
        delta,
        dk,
        dv,
        k.shape[1],
        key_tiles,
        scale,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''
)

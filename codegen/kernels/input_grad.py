"""Gradient of the rows that a grouped projection read, taken through the expression that made them.

Shapes in the emitted code: M rows of one tile, R = T * k routed rows, N columns of the projection's result (reduced),
K columns of its input, H accumulators of the projection before (2 for gated expressions).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.derivative import differentiate
from moefx.codegen.emit import render
from moefx.codegen.kernels.tiles import ranked_tiles
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, LinearSpec, digest, require_dtype
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class InputGradSpec(Kernel):
    """``g[r] = weight[e(r)].T @ grad[r]`` and ``out[r] = g[r] * expression'(z[r])`` for rows sorted by expert.

    ``z`` is what the forward pass kept.  With ``combined`` the projection's rows went into a weighted sum over slots:
    ``grad`` is that of tokens, ``out`` is weighted, and the gradient of the weight is stored as one partial sum per
    column tile, so that no order of additions is left to chance.  ``value`` is the recomputed (and then weighted)
    input of the projection, which the gradient of its weight reads.  Dropped rows are written as zero.
    """

    columns: int
    reduced: int
    dtype: str
    weights: int = 1
    combined: bool = False
    bias: bool = False
    top_k: int = 1
    before: Pointwise = field(default_factory=Pointwise)
    precision: str = "ieee"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def recomputes(self) -> bool:
        """Whether ``z`` is read and ``value`` written."""
        return self.combined or not self.before.is_identity

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        words = f"input_grad N={self.reduced} K={self.columns} weights={self.weights} dtype={self.dtype}"
        tail = f"combined={self.combined} bias={self.bias} top_k={self.top_k} precision={self.precision}"
        return "\n".join([words, tail, self.before.text()])

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        words = ["combined"] if self.combined else []
        words += ["input_grad", f"{self.reduced}x{self.columns}", self.dtype, digest(self.text)[:10]]
        return "_".join(words)

    @property
    def weight_names(self) -> list[str]:
        """Names of the stacked weights."""
        return ["weight"] if self.weights == 1 else [f"weight{i}" for i in range(self.weights)]

    @property
    def parameters(self) -> list[str]:
        """Names of the tensors that ``launch`` takes, in order."""
        bias = ["bias"] if self.bias and self.combined else []
        routing = ["order", "gates"] if self.combined else []
        kept, value = (["kept"], ["value"]) if self.recomputes else ([], [])
        partial = ["partial"] if self.combined else []
        return ["grad", *self.weight_names, *bias, *routing, *kept, "tile_map", "out", *value, *partial]

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the cheapest tiles by the cost model."""
        return self.candidates(target, load, block_m)[0]

    def candidates(self, target: Target, load: int, block_m: int) -> tuple[Schedule, ...]:
        """Return tiles of several widths, priced as the product of all gradients with the transposed weights."""
        like = LinearSpec(self.reduced * self.weights, self.columns, self.dtype, precision=self.precision)
        return ranked_tiles(target, like, load, block_m, 128)

    def column_tiles(self, schedule: Schedule) -> int:
        """Return how many partial sums of a weight's gradient there are."""
        return -(-self.columns // schedule.block_n)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        derivative = differentiate(self.before)
        splits, pieces = pieces_of(schedule.block_m, schedule.block_n)
        n, k = self.reduced, self.columns
        return render(
            TEMPLATE,
            title=f"{self.name}: gradient of the rows that a grouped projection read.",
            meaning=self._meaning(),
            facts=f"N = {n}, K = {k}; {schedule.describe()}.",
            helpers=[_templates.HELPERS[name] for name in derivative.helpers],
            dtype=self.dtype,
            weight_names=self.weight_names,
            parameters=self.parameters,
            combined=self.combined,
            bias=self.bias and self.combined,
            top_k=self.top_k,
            recomputes=self.recomputes,
            halves=self.before.inputs,
            splits=splits,
            pieces=pieces,
            piece=schedule.block_n // len(pieces),
            n=n,
            k=k,
            mask_n=n % schedule.block_k != 0,
            mask_k=k % schedule.block_n != 0,
            column_tiles=self.column_tiles(schedule),
            block_m=schedule.block_m,
            block_k=schedule.block_n,
            block_n=schedule.block_k,
            group_m=schedule.group_m,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            precision=f', input_precision="{self.precision}"' if self.dtype == "float32" else "",
            statements=derivative.triton(),
            value=derivative.printed_value(),
            grads=derivative.printed_grads(),
        )

    def _meaning(self) -> str:
        source = ("order[r]" if self.top_k == 1 else f"order[r] // {self.top_k}") if self.combined else "r"
        sums = [f"{w}[e].T @ grad{i if self.weights > 1 else ''}[{source}]" for i, w in enumerate(self.weight_names)]
        lines = [f"g[r] = {' + '.join(sums)}   with e the expert of row r"]
        if self.combined:
            lines.append("partial[., r] sums to the gradient of the row's weight; g is weighted then")
        if not self.recomputes:
            return "\n".join([*lines, "out[r] = g[r]"])
        return "\n".join([*lines, "value[r], out[r] = expression(z[r]), g[r] * expression'(z[r])"])

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, flat = TRITON_TYPES[self.dtype], rows * self.top_k
        found: list[Any] = [[item, [rows, self.reduced * self.weights]]]
        found += [[item, [experts, self.reduced, self.columns]]] * self.weights
        found += [[item, [experts, self.reduced]]] if self.bias and self.combined else []
        found += [["i64", [flat]], ["fp32", [rows, self.top_k]]] if self.combined else []
        kept = [item, [flat, self.before.inputs * self.columns]]
        found += [kept] if self.recomputes else []
        found += [["i32", [3, tiles]], kept]
        found += [[item, [flat, self.columns]]] if self.recomputes else []
        found += [["fp32", [4, flat]]] if self.combined else []
        return [*found, False]


def pieces_of(rows: int, columns: int) -> tuple[list[str], list[str]]:
    """Return the statements that cut the tile ``g`` into pieces of at most 32 columns, and the pieces in order.

    A whole tile of an expression, its derivative and what they read does not fit into registers.
    """
    pieces, statements = ["g"], []
    while columns > _PIECE:
        columns //= 2
        halves = [(f"{piece}{i}" for i in (0, 1)) for piece in pieces]
        named = [tuple(half) for half in halves]
        statements += [
            f"{a}, {b} = tl.split(tl.permute(tl.reshape({piece}, ({rows}, 2, {columns})), (0, 2, 1)))"
            for piece, (a, b) in zip(pieces, named, strict=True)
        ]
        pieces = [name for pair in named for name in pair]
    return statements, pieces


_PIECE = 32

TEMPLATE = '''@triton.jit
def kernel(
    grad_ptr,  # {{ dtype }} {{ "[T, N]" if combined else "[R, %d]" % (n * weight_names | length) }}
{% for name in weight_names %}
    {{ name }}_ptr,  # {{ dtype }} [E, N, K], contiguous
{% endfor %}
{% if bias %}
    bias_ptr,  # {{ dtype }} [E, N]
{% endif %}
{% if combined %}
    order_ptr,  # int64 [R]
    gates_ptr,  # float32 [T, k], contiguous
{% endif %}
{% if recomputes %}
    kept_ptr,  # {{ dtype }} [R, {{ halves * k }}]
{% endif %}
    map_ptr,  # int32 [3, TILES], see the tile map kernel
    out_ptr,  # {{ dtype }} [R, {{ halves * k }}]
{% if recomputes %}
    value_ptr,  # {{ dtype }} [R, K]
{% endif %}
{% if combined %}
    partial_ptr,  # float32 [{{ column_tiles }}, R]
    rows,
{% endif %}
    grad_stride,
    reduced,  # N: an argument, since compilers unroll a loop of known length until registers spill
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
    tile_k = pid % ({{ group_m }} * {{ column_tiles }}) // height

    expert = tl.load(map_ptr + tile_m)
    if expert < 0:
        return
    row_start = tl.load(map_ptr + tiles + tile_m)
    row_end = tl.load(map_ptr + 2 * tiles + tile_m)
    row = row_start + tl.arange(0, {{ block_m }})
    col = tile_k * {{ block_k }} + tl.arange(0, {{ block_k }})
    if expert == experts:  # dropped rows are zero, and always written
        out = out_ptr + row.to(tl.int64)[:, None] * {{ halves * k }} + col[None, :]
{% if recomputes %}
        value = value_ptr + row.to(tl.int64)[:, None] * {{ k }} + col[None, :]
{% endif %}
        keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % k if mask_k else "(row < row_end)[:, None]" }}
        nothing = tl.zeros(({{ block_m }}, {{ block_k }}), out_ptr.dtype.element_ty)
{% for half in range(halves) %}
        tl.store(out{{ " + %d" % (half * k) if half }}, nothing, mask=keep)
{% endfor %}
{% if recomputes %}
        tl.store(value, nothing, mask=keep)
{% endif %}
{% if combined %}
        zeros = tl.zeros(({{ block_m }},), tl.float32)
        tl.store(partial_ptr + tile_k.to(tl.int64) * rows + row, zeros, mask=row < row_end)
{% endif %}
        return

    # Rows past the end of the group re-read its first row: finite data, no predicate in the loop, masked when stored.
    source = tl.where(row < row_end, row, row_start).to(tl.int64)
{% if combined %}
    slot = tl.load(order_ptr + source)
{% endif %}
    ns = tl.arange(0, {{ block_n }})
    grad_row = {{ ("slot // %d" % top_k if top_k > 1 else "slot") if combined else "source" }}
    grad = grad_ptr + grad_row[:, None] * grad_stride + ns[None, :]
{% if combined %}
    partial = tl.zeros(({{ block_m }},), tl.float32)
{% endif %}
{% if bias %}
    if tile_k == 0:  # the bias adds to the projection's rows, hence to the gradient of their weights
        bias = bias_ptr + expert.to(tl.int64) * {{ n }} + ns
        for n0 in range(0, reduced, {{ block_n }}):
            grad_tile = tl.load(grad + n0, mask=(ns < {{ n }} - n0)[None, :], other=0.0).to(tl.float32)
            bias_tile = tl.load(bias + n0, mask=ns < {{ n }} - n0, other=0.0).to(tl.float32)
            partial += tl.sum(grad_tile * bias_tile[None, :], 1)
{% endif %}
    weight = expert.to(tl.int64) * {{ n * k }} + ns[:, None] * {{ k }}
    weight += {{ "tl.minimum(col, %d)" % (k - 1) if mask_k else "col" }}[None, :]
    g = tl.zeros(({{ block_m }}, {{ block_k }}), tl.float32)
{% for name in weight_names %}
    grad_at = grad{{ " + %d" % (loop.index0 * n) if loop.index0 }}
    weight_at = {{ name }}_ptr + weight
    for {{ "n0" if mask_n else "_" }} in range(0, reduced, {{ block_n }}):
{% if mask_n %}
        grad_tile = tl.load(grad_at, mask=(ns < {{ n }} - n0)[None, :], other=0.0)
        weight_tile = tl.load(weight_at, mask=(ns < {{ n }} - n0)[:, None], other=0.0)
{% else %}
        grad_tile = tl.load(grad_at)
        weight_tile = tl.load(weight_at)
{% endif %}
        if UPCAST:
            grad_tile = grad_tile.to(tl.float32)
            weight_tile = weight_tile.to(tl.float32)
        g = tl.dot(grad_tile, weight_tile, g{{ precision }})
        grad_at += {{ block_n }}
        weight_at += {{ block_n * k }}
{% endfor %}

{% if recomputes %}
    # What the forward pass kept, its value and its derivative, in float32 and a few columns at a time.
{% for statement in splits %}
    {{ statement }}
{% endfor %}
{% if combined %}
    gate = tl.load(gates_ptr + slot)
{% endif %}
{% for name in pieces %}

    col = tile_k * {{ block_k }} + {{ "%d + " % (loop.index0 * piece) if loop.index0 }}tl.arange(0, {{ piece }})
    keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % k if mask_k else "(row < row_end)[:, None]" }}
    at = row.to(tl.int64)[:, None] * {{ halves * k }} + col[None, :]
{% for half in range(halves) %}
    z{{ half }} = tl.load(kept_ptr + at{{ " + %d" % (half * k) if half }}, mask=keep, other=0.0).to(tl.float32)
{% endfor %}
{% if combined %}
    unweighted = {{ name }}
    g = unweighted * gate[:, None]
{% elif name != "g" %}
    g = {{ name }}
{% endif %}
{% for statement in statements %}
    {{ statement }}
{% endfor %}
{% if combined %}
    partial += tl.sum(tl.where(keep, unweighted * {{ value }}, 0.0), 1)
{% endif %}
{% for grad in grads %}
    d{{ loop.index0 }} = ({{ grad }}).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at{{ " + %d" % (loop.index0 * k) if loop.index0 }}, d{{ loop.index0 }}, mask=keep)
{% endfor %}
    recomputed = {{ value }}{{ " * gate[:, None]" if combined }}
{% if halves > 1 %}
    at = row.to(tl.int64)[:, None] * {{ k }} + col[None, :]
{% endif %}
    tl.store(value_ptr + at, recomputed.to(value_ptr.dtype.element_ty), mask=keep)
{% endfor %}
{% if combined %}
    tl.store(partial_ptr + tile_k.to(tl.int64) * rows + row, partial, mask=row < row_end)
{% endif %}
{% else %}
    keep = {{ "(row < row_end)[:, None] & (col < %d)[None, :]" % k if mask_k else "(row < row_end)[:, None]" }}
    tl.store(out_ptr + row.to(tl.int64)[:, None] * {{ k }} + col[None, :], g.to(out_ptr.dtype.element_ty), mask=keep)
{% endif %}


def launch(
{% for name in parameters %}
    {{ name }},
{% endfor %}
    upcast,
):
    """Write ``out``{{ ", ``value``" if recomputes }}{{ " and ``partial``" if combined }}."""
    tiles = tile_map.shape[1]
    kernel[(tiles * {{ column_tiles }},)](
{% for name in parameters %}
        {{ name }},
{% endfor %}
{% if combined %}
        partial.shape[1],
{% endif %}
        grad.stride(0),
        {{ n }},
        {{ weight_names[0] }}.shape[0],
        tiles,
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''

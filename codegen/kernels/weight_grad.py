"""Gradient of a stacked weight and of its bias: one product over the rows of each expert.

Shapes in the emitted code: R = T * k routed rows, E experts, N columns of the projection's result, K of its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.kernels.tiles import ranked_tiles
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, LinearSpec, digest, require_dtype
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class WeightGradSpec(Kernel):
    """``out[e] = sum over rows r of e of outer(grad[r], x[r])``, and ``bias[e]`` the sum of ``grad[r]`` alone.

    ``x`` is read by token with ``gather``; ``grad`` is with ``combined``, and then the bias's rows are weighted (those
    of ``x`` have been).  Every expert is written, one without rows as zero, in one order of additions.
    """

    rows: int
    columns: int
    dtype: str
    gather: bool = False
    combined: bool = False
    bias: bool = False
    top_k: int = 1
    precision: str = "ieee"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        words = f"weight_grad N={self.rows} K={self.columns} dtype={self.dtype} gather={self.gather}"
        return f"{words} combined={self.combined} bias={self.bias} top_k={self.top_k} precision={self.precision}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"weight_grad_{self.rows}x{self.columns}_{self.dtype}_{digest(self.text)[:10]}"

    @property
    def reads_order(self) -> bool:
        """Whether either operand is read by token."""
        return self.gather or self.combined

    @property
    def weighs_bias(self) -> bool:
        """Whether the rows of the bias's gradient are weighted here."""
        return self.combined and self.bias

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the cheapest tiles by the cost model."""
        return self.candidates(target, load, block_m)[0]

    def candidates(self, target: Target, load: int, block_m: int) -> tuple[Schedule, ...]:
        """Return tiles of several widths: N and K are tiled, an expert's rows are walked over, few where there are few.

        Priced as a product in which the N rows of the result are the load and the expert's rows are summed over.
        """
        height = min(128, 1 << max(4, self.rows.bit_length() - 1))
        if target.is_interpreter:
            height = min(64, height)
        like = LinearSpec(max(16, load), self.columns, self.dtype, precision=self.precision)
        return ranked_tiles(target, like, self.rows, height, 128)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        n, k = self.rows, self.columns
        gathered = "slot" if self.top_k == 1 else f"slot // {self.top_k}"
        return render(
            TEMPLATE,
            title=f"{self.name}: gradient of a stacked weight{' and of its bias' if self.bias else ''}.",
            meaning="out[e] = sum over the rows r of expert e of outer(grad[r], x[r]); no rows, zero",
            facts=f"N = {n}, K = {k}; {schedule.describe()}.",
            helpers=[],
            parameters=self._parameters(),
            dtype=self.dtype,
            reads_order=self.reads_order,
            combined=self.combined,
            bias=self.bias,
            grad_row=gathered if self.combined else "row",
            x_row=gathered if self.gather else "row",
            n=n,
            k=k,
            mask_n=n % schedule.block_m != 0,
            mask_k=k % schedule.block_n != 0,
            tiles_n=-(-n // schedule.block_m),
            tiles_k=-(-k // schedule.block_n),
            block_n=schedule.block_m,
            block_k=schedule.block_n,
            block_r=schedule.block_k,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            precision=f', input_precision="{self.precision}"' if self.dtype == "float32" else "",
        )

    def _parameters(self) -> list[str]:
        inputs = ["grad", "x", *(["order"] if self.reads_order else []), *(["gates"] if self.weighs_bias else [])]
        return [*inputs, "offsets", "out", *(["bias"] if self.bias else []), "upcast"]

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, flat = TRITON_TYPES[self.dtype], rows * self.top_k
        found: list[Any] = [[item, [rows if self.combined else flat, self.rows]]]
        found += [[item, [rows if self.gather else flat, self.columns]]]
        found += [["i64", [flat]]] if self.reads_order else []
        found += [["fp32", [rows, self.top_k]]] if self.weighs_bias else []
        found += [["i64", [experts + 1]], [item, [experts, self.rows, self.columns]]]
        found += [[item, [experts, self.rows]]] if self.bias else []
        return [*found, False]


TEMPLATE = '''@triton.jit
def kernel(
    grad_ptr,  # {{ dtype }} {{ "[T, N]" if combined else "[R, N]" }}
    x_ptr,  # {{ dtype }} [., K]
{% if reads_order %}
    order_ptr,  # int64 [R]
{% endif %}
{% if combined and bias %}
    gates_ptr,  # float32 [T, k], contiguous
{% endif %}
    offsets_ptr,  # int64 [E + 1], first row of each expert
    out_ptr,  # {{ dtype }} [E, N, K]
{% if bias %}
    bias_ptr,  # {{ dtype }} [E, N]
{% endif %}
    grad_stride,
    x_stride,
    UPCAST: tl.constexpr,  # the interpreter has no arithmetic for bfloat16
):
    pid = tl.program_id(0)
    expert = (pid // {{ tiles_n * tiles_k }}).to(tl.int64)
    tile_n = pid % {{ tiles_n * tiles_k }} // {{ tiles_k }}
    tile_k = pid % {{ tiles_k }}
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    n = tile_n * {{ block_n }} + tl.arange(0, {{ block_n }})
    k = tile_k * {{ block_k }} + tl.arange(0, {{ block_k }})
    rs = tl.arange(0, {{ block_r }})
{% if mask_n %}
    grad = grad_ptr + tl.minimum(n, {{ n - 1 }})[None, :]
{% else %}
    grad = grad_ptr + n[None, :]
{% endif %}
{% if mask_k %}
    x = x_ptr + tl.minimum(k, {{ k - 1 }})[None, :]
{% else %}
    x = x_ptr + k[None, :]
{% endif %}
    total = tl.zeros(({{ block_n }}, {{ block_k }}), tl.float32)
    for row0 in range(start, end, {{ block_r }}):
        # Rows past the end belong to another expert: zero in both operands, since zero times infinity is no zero.
        row = row0 + rs
        mine = row < end
{% if reads_order %}
        slot = tl.load(order_ptr + row, mask=mine, other=0)
{% endif %}
        grad_tile = tl.load(grad + ({{ grad_row }})[:, None] * grad_stride, mask=mine[:, None], other=0.0)
        x_tile = tl.load(x + ({{ x_row }})[:, None] * x_stride, mask=mine[:, None], other=0.0)
        if UPCAST:
            grad_tile = grad_tile.to(tl.float32)
            x_tile = x_tile.to(tl.float32)
        total = tl.dot(tl.trans(grad_tile), x_tile, total{{ precision }})
    out = out_ptr + expert * {{ n * k }} + n[:, None] * {{ k }} + k[None, :]
{% if mask_n or mask_k %}
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(n < {{ n }})[:, None] & (k < {{ k }})[None, :])
{% else %}
    tl.store(out, total.to(out_ptr.dtype.element_ty))
{% endif %}
{% if bias %}

    if tile_k == 0:
        bias = tl.zeros(({{ block_n }},), tl.float32)
        for row0 in range(start, end, {{ block_r }}):
            row = row0 + rs
            mine = row < end
{% if reads_order %}
            slot = tl.load(order_ptr + row, mask=mine, other=0)
{% endif %}
            grad_tile = tl.load(grad + ({{ grad_row }})[:, None] * grad_stride, mask=mine[:, None], other=0.0)
            grad_tile = grad_tile.to(tl.float32)
{% if combined %}
            grad_tile *= tl.load(gates_ptr + slot, mask=mine, other=0.0)[:, None]
{% endif %}
            bias += tl.sum(grad_tile, 0)
        tl.store(bias_ptr + expert * {{ n }} + n, bias.to(bias_ptr.dtype.element_ty){{ ", mask=n < %d" % n if mask_n }})
{% endif %}


def launch({{ parameters | join(", ") }}):
    """Write ``out`` [E, N, K]{{ " and ``bias`` [E, N]" if bias }}; rows of both operands may have any stride."""
    kernel[(out.shape[0] * {{ tiles_n * tiles_k }},)](
        grad,
        x,
{% if reads_order %}
        order,
{% endif %}
{% if combined and bias %}
        gates,
{% endif %}
        offsets,
        out,
{% if bias %}
        bias,
{% endif %}
        grad.stride(0),
        x.stride(0),
        UPCAST=upcast,
        num_warps={{ num_warps }},
        num_stages={{ num_stages }},
    )
'''

"""Gradient through the expression behind a region's last projection, where no product stands before it.

Shapes in the emitted code: R = T * k routed rows, N columns, H accumulators of the projection (2 for gated ones).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.derivative import differentiate
from moefx.codegen.emit import render
from moefx.codegen.kernels.tiles import power_of_two
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, digest, require_dtype
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class PointGradSpec(Kernel):
    """``out[r] = grad[r] * expression'(z[r])``, where ``z`` is what the forward pass kept.

    With ``combined`` the rows went into a weighted sum over slots: ``grad`` is that of tokens, ``out`` is weighted, and
    the gradient of each row's weight is stored too.  Dropped rows are written as zero.
    """

    columns: int
    dtype: str
    combined: bool = False
    top_k: int = 1
    before: Pointwise = field(default_factory=Pointwise)

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        words = f"point_grad N={self.columns} dtype={self.dtype} combined={self.combined} top_k={self.top_k}"
        return f"{words}\n{self.before.text()}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"point_grad_{self.columns}_{self.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: a program walks over the columns of a few rows, so that sums over them are its own."""
        return Schedule(8, min(256, power_of_two(self.columns)), 16, 4, 1, 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        derivative = differentiate(self.before)
        return render(
            TEMPLATE,
            title=f"{self.name}: gradient through the expression behind a grouped projection.",
            meaning="out[r] = grad[r] * expression'(z[r])",
            facts=f"N = {self.columns}; {schedule.block_m} rows per program.",
            helpers=[_templates.HELPERS[name] for name in derivative.helpers],
            dtype=self.dtype,
            combined=self.combined,
            top_k=self.top_k,
            halves=self.before.inputs,
            n=self.columns,
            block_m=schedule.block_m,
            block_n=schedule.block_n,
            num_warps=schedule.num_warps,
            statements=derivative.triton(),
            value=derivative.printed_value(),
            grads=derivative.printed_grads(),
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, flat = TRITON_TYPES[self.dtype], rows * self.top_k
        kept = [item, [flat, self.before.inputs * self.columns]]
        found: list[Any] = [[item, [rows, self.columns]]]
        found += [["i64", [flat]], ["fp32", [rows, self.top_k]]] if self.combined else []
        found += [kept, ["i64", [experts + 1]], kept]
        return [*found, ["fp32", [1, flat]]] if self.combined else found


TEMPLATE = '''@triton.jit
def kernel(
    grad_ptr,  # {{ dtype }} {{ "[T, N]" if combined else "[R, N]" }}
{% if combined %}
    order_ptr,  # int64 [R]
    gates_ptr,  # float32 [T, k], contiguous
{% endif %}
    kept_ptr,  # {{ dtype }} [R, {{ halves * n }}]
    offsets_ptr,  # int64 [E + 1]; dropped rows start at the last one
    out_ptr,  # {{ dtype }} [R, {{ halves * n }}]
{% if combined %}
    partial_ptr,  # float32 [1, R]
{% endif %}
    grad_stride,
    rows,
    experts,
):
    row = tl.program_id(0).to(tl.int64) * {{ block_m }} + tl.arange(0, {{ block_m }})
    exists = row < rows
    mine = row < tl.load(offsets_ptr + experts)
{% if combined %}
    slot = tl.load(order_ptr + row, mask=mine, other=0)
    gate = tl.load(gates_ptr + slot, mask=mine, other=0.0)
    source = slot{{ " // %d" % top_k if top_k > 1 }}
    partial = tl.zeros(({{ block_m }},), tl.float32)
{% else %}
    source = row
{% endif %}
    for col0 in range(0, {{ n }}, {{ block_n }}):
        col = col0 + tl.arange(0, {{ block_n }})
        read = mine[:, None] & (col < {{ n }})[None, :]
        g = tl.load(grad_ptr + source[:, None] * grad_stride + col[None, :], mask=read, other=0.0).to(tl.float32)
        at = row[:, None] * {{ halves * n }} + col[None, :]
{% for half in range(halves) %}
        z{{ half }} = tl.load(kept_ptr + at{{ " + %d" % (half * n) if half }}, mask=read, other=0.0).to(tl.float32)
{% endfor %}
{% if combined %}
        unweighted = g
        g = g * gate[:, None]
{% endif %}
{% for statement in statements %}
        {{ statement }}
{% endfor %}
{% if combined %}
        partial += tl.sum(tl.where(read, unweighted * {{ value }}, 0.0), 1)
{% endif %}
        write = exists[:, None] & (col < {{ n }})[None, :]
{% for grad in grads %}
        d{{ loop.index0 }} = tl.where(read, {{ grad }}, 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at{{ " + %d" % (loop.index0 * n) if loop.index0 }}, d{{ loop.index0 }}, mask=write)
{% endfor %}
{% if combined %}
    tl.store(partial_ptr + row, partial, mask=exists)
{% endif %}


def launch(grad, {{ "order, gates, " if combined }}kept, offsets, out{{ ", partial" if combined }}):
    """Write ``out``{{ " and ``partial``" if combined }}."""
    rows = out.shape[0]
    kernel[(triton.cdiv(rows, {{ block_m }}),)](
        grad,
{% if combined %}
        order,
        gates,
{% endif %}
        kept,
        offsets,
        out,
{% if combined %}
        partial,
{% endif %}
        grad.stride(0),
        rows,
        offsets.shape[0] - 1,
        num_warps={{ num_warps }},
    )
'''

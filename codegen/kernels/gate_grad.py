"""Gradient of the weights of a combine from the partial sums of its rows.

Shapes in the emitted code: R = T * k routed rows, P partial sums of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import Kernel
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class GateGradSpec(Kernel):
    """``out[order[r]] = sum over p of partial[p, r]``, in the order of p."""

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return "gate_grad"

    @property
    def name(self) -> str:
        """There is one kernel for all models."""
        return self.text

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: 256 rows per program."""
        return Schedule(256, 16, 16, 4, 1, 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        return render(
            TEMPLATE,
            title="gate_grad: gradient of the weights of a combine.",
            meaning="out[order[r]] = sum over p of partial[p, r], in order, so that repeated runs give the same bits",
            facts=f"{schedule.block_m} rows per program.",
            helpers=[],
            block=schedule.block_m,
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        return [["fp32", [9, rows]], ["i64", [rows]], ["fp32", [rows]]]


TEMPLATE = '''@triton.jit
def kernel(partial_ptr, order_ptr, out_ptr, rows, parts):
    row = tl.program_id(0).to(tl.int64) * {{ block }} + tl.arange(0, {{ block }})
    exists = row < rows
    total = tl.zeros(({{ block }},), tl.float32)
    partial = partial_ptr + row
    for _ in range(0, parts):
        total += tl.load(partial, mask=exists, other=0.0)
        partial += rows
    tl.store(out_ptr + tl.load(order_ptr + row, mask=exists, other=0), total, mask=exists)


def launch(partial, order, out):
    """Write ``out`` float32 [R] from ``partial`` float32 [P, R]."""
    parts, rows = partial.shape
    kernel[(triton.cdiv(rows, {{ block }}),)](partial, order, out, rows, parts, num_warps=4)
'''

"""Rows added up by the token that they belong to: the gradient of taking tokens out of a sequence.

Shapes in the emitted code: T tokens, R rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.kernels.tiles import column_tiles
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, require_dtype
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class TokenSumSpec(Kernel):
    """``out[t] = sum over i of rows[order[i]]`` for ``offsets[t] <= i < offsets[t + 1]``, in order; no rows, zero."""

    features: int
    dtype: str

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"token_sum D={self.features} dtype={self.dtype}"

    @property
    def name(self) -> str:
        """A readable name."""
        return f"token_sum_{self.features}_{self.dtype}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: one token and up to 1024 columns per program."""
        return column_tiles(self.features)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        n, columns = self.features, schedule.block_n
        masked = n % columns != 0
        return render(
            TEMPLATE,
            title=f"{self.name}: rows added up by token.",
            meaning="out[t] = sum over i in [offsets[t], offsets[t + 1]) of rows[order[i]], in float32 and in order",
            facts=f"D = {n}; {columns} columns per program, {schedule.num_warps} warps.",
            helpers=[],
            dtype=self.dtype,
            n=n,
            columns=columns,
            tiles=-(-n // columns),
            mask=f", mask=col < {n}" if masked else "",
            other=f", mask=col < {n}, other=0.0" if masked else "",
            num_warps=schedule.num_warps,
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item = TRITON_TYPES[self.dtype]
        taken, whole = [item, [rows, self.features]], [item, [4 * rows, self.features]]
        return [taken, ["i64", [rows]], ["i64", [4 * rows + 1]], whole]


TEMPLATE = '''@triton.jit
def kernel(
    rows_ptr,  # {{ dtype }} [R, D], contiguous
    order_ptr,  # int64 [R], rows by token
    offsets_ptr,  # int64 [T + 1], first row of each token
    out_ptr,  # {{ dtype }} [T, D]
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * {{ columns }} + tl.arange(0, {{ columns }})
    total = tl.zeros(({{ columns }},), tl.float32)
    for i in range(tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)):
        row = tl.load(order_ptr + i)
        total += tl.load(rows_ptr + row * {{ n }} + col{{ other }}).to(tl.float32)
    tl.store(out_ptr + token * {{ n }} + col, total.to(out_ptr.dtype.element_ty){{ mask }})


def launch(rows, order, offsets, out):
    """Write ``out`` [T, D]."""
    kernel[(out.shape[0], {{ tiles }})](rows, order, offsets, out, num_warps={{ num_warps }})
'''

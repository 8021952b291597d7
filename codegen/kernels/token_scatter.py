"""Tokens put back into their sequence: the expression that makes them, and every other token, in one pass.

Shapes in the emitted code: T tokens of all samples, R of them put back, B samples, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.emit import call, printed, render
from moefx.codegen.kernels.tiles import column_tiles
from moefx.codegen.kernels.token_program import SHAPES, TokenProgram
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, digest
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class TokenScatterSpec(Kernel):
    """``out = x; out[index[r]] = program(rows[r], operands)``, of an index without repetitions.

    Every token is written once and no other is read, so what the index leaves out costs a copy and nothing more.
    """

    program: TokenProgram

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"token_scatter\n{self.program.text}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"token_scatter_{self.program.features}_{self.program.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: one token and up to 1024 columns per program."""
        return column_tiles(self.program.features)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        p, columns = self.program, schedule.block_n
        masked = p.features % columns != 0
        last = ["x.stride(0)", *(["sample_rows"] if p.first_sample else []), f"num_warps={schedule.num_warps}"]
        return render(
            TEMPLATE,
            title=f"{self.name}: tokens put back into their sequence.",
            meaning="out[index[r]] = program(rows[r], ...), in float32; every other token as in x",
            facts=f"D = {p.features}; {columns} columns per program, {schedule.num_warps} warps.",
            helpers=[_templates.HELPERS[name] for name in p.program.helpers],
            dtype=p.dtype,
            shapes=[SHAPES[kind] for kind in p.operands],
            signature=call("def launch", ["rows", "x", "index", "position", *p.names, "out"], ":"),
            start=call("kernel[grid]", ["rows", "x", "position", *p.names, "out", *last], indent="    "),
            first_sample=p.first_sample,
            n=p.features,
            columns=columns,
            tiles=-(-p.features // columns),
            mask=f", mask=col < {p.features}" if masked else "",
            masked=masked,
            loads=p.loads(tuple(SHAPES), masked),
            statements=p.program.triton(),
            result=printed(p.program),
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        p, item = self.program, TRITON_TYPES[self.program.dtype]
        whole: list[Any] = [item, [4 * rows, p.features]]
        given = [[item, [rows, p.features]], whole, ["i64", [rows]], ["i64", [4 * rows]]]
        return [*given, *p.argument_shapes(rows, item), whole]


TEMPLATE = '''@triton.jit
def invert(index_ptr, position_ptr, rows, BLOCK: tl.constexpr):
    """position[index[r]] = r: which row each token takes."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(index_ptr + row, mask=row < rows, other=0)
    tl.store(position_ptr + token, row, mask=row < rows)


@triton.jit
def kernel(
    rows_ptr,  # {{ dtype }} [R, D], contiguous
    x_ptr,  # {{ dtype }} [T, D]
    position_ptr,  # int64 [T]; -1 where a token stays as it is
{% for shape in shapes %}
    z{{ loop.index }}_ptr,  # {{ shape }}, contiguous
{% endfor %}
    out_ptr,  # {{ dtype }} [T, D]
    x_stride,
{% if first_sample %}
    sample_rows,  # R / B
{% endif %}
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * {{ columns }} + tl.arange(0, {{ columns }})
    out = out_ptr + token * {{ n }} + col
    row = tl.load(position_ptr + token)
    if row < 0:
        tl.store(out, tl.load(x_ptr + token * x_stride + col{{ mask }}{{ ", other=0.0" if masked }}){{ mask }})
        return
    z0 = tl.load(rows_ptr + row * {{ n }} + col{{ mask }}{{ ", other=0.0" if masked }}).to(tl.float32)
{% for load in loads %}
    {{ load }}
{% endfor %}
{% for statement in statements %}
    {{ statement }}
{% endfor %}
    tl.store(out, {{ result }}.to(out_ptr.dtype.element_ty){{ mask }})


{{ signature }}
    """Write ``out`` [T, D]; ``position`` int64 [T] is scratch and comes filled with -1."""
    invert[(triton.cdiv(index.shape[0], 1024),)](index, position, index.shape[0], BLOCK=1024)
    grid = (out.shape[0], {{ tiles }})
{% if first_sample %}
    sample_rows = rows.shape[0] // {{ first_sample }}.shape[0]
{% endif %}
{{ start }}
'''

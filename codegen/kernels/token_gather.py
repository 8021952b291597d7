"""Tokens taken out of a sequence, normalised and modulated in one pass over memory.

Shapes in the emitted code: T tokens of all samples, R of them taken, B samples, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.emit import call, printed, render
from moefx.codegen.kernels.token_program import NORM, SHAPES, TokenProgram
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, digest
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class TokenGatherSpec(Kernel):
    """``out[r] = program(norm(x[index[r]]), operands)``; with ``keeps`` also ``rows[r] = x[index[r]]``."""

    program: TokenProgram
    keeps: bool = False

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"token_gather keeps={self.keeps}\n{self.program.text}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        p = self.program
        return f"token_gather_{p.norm or 'plain'}_{p.features}_{p.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: a program takes one token, whose sums stay in registers."""
        return self.program.tiles(target)

    @property
    def outputs(self) -> list[str]:
        """Names of what the kernel writes."""
        return ["out", "rows"] if self.keeps else ["out"]

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        p = self.program
        names = ["x", "index", *p.names, *self.outputs]
        last = ["x.stride(0)", *(["sample_rows"] if p.first_sample else []), f"num_warps={schedule.num_warps}"]
        return render(
            TEMPLATE,
            title=f"{self.name}: tokens taken out of a sequence{f', {p.norm} norm' if p.norm else ''}, modulated.",
            meaning="out[r] = program(norm(x[index[r]]), ...), the statements before the store, in float32",
            facts=f"D = {p.features}; one token per program, {schedule.num_warps} warps.",
            helpers=[_templates.HELPERS[name] for name in p.program.helpers],
            dtype=p.dtype,
            out_dtype=p.out_dtype,
            shapes=[SHAPES[kind] for kind in p.operands],
            signature=call("def launch", names, ":"),
            start=call("kernel[(out.shape[0],)]", [*names, *last], indent="    "),
            keeps=self.keeps,
            first_sample=p.first_sample,
            norm=p.norm,
            eps=repr(p.eps),
            pad="    ",
            n=p.features,
            block=p.block,
            masked=p.is_masked,
            mask=f", mask=col < {p.features}" if p.is_masked else "",
            loads=p.loads(tuple(SHAPES), p.is_masked),
            statements=p.program.triton(),
            result=printed(p.program),
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        p, item = self.program, TRITON_TYPES[self.program.dtype]
        given: list[Any] = [[item, [4 * rows, p.features]], ["i64", [rows]], *p.argument_shapes(rows, item)]
        given += [[TRITON_TYPES[p.out_dtype], [rows, p.features]]]
        return [*given, [item, [rows, p.features]]] if self.keeps else given


TEMPLATE = (
    '''@triton.jit
def kernel(
    x_ptr,  # {{ dtype }} [T, D]
    index_ptr,  # int64 [R]
{% for shape in shapes %}
    z{{ loop.index }}_ptr,  # {{ shape }}, contiguous
{% endfor %}
    out_ptr,  # {{ out_dtype }} [R, D]
{% if keeps %}
    rows_ptr,  # {{ dtype }} [R, D], the tokens as they were
{% endif %}
    x_stride,
{% if first_sample %}
    sample_rows,  # R / B
{% endif %}
):
    """One token, read once: its sums stay in registers."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, {{ block }})
    source = tl.load(index_ptr + row)
    x = tl.load(x_ptr + source * x_stride + col{{ mask }}{{ ", other=0.0" if masked }})
{% if keeps %}
    tl.store(rows_ptr + row * {{ n }} + col, x{{ mask }})
{% endif %}
    x = x.to(tl.float32)
'''
    + NORM
    + '''{% for load in loads %}
    {{ load }}
{% endfor %}
{% for statement in statements %}
    {{ statement }}
{% endfor %}
    tl.store(out_ptr + row * {{ n }} + col, {{ result }}.to(out_ptr.dtype.element_ty){{ mask }})


{{ signature }}
    """Write ``out`` [R, D]{{ " and ``rows`` [R, D]" if keeps }}; rows of ``x`` may have any stride."""
{% if first_sample %}
    sample_rows = out.shape[0] // {{ first_sample }}.shape[0]
{% endif %}
{{ start }}
'''
)

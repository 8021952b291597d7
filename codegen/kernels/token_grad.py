"""Gradient of an expression over rows, and of the norm before it, in one pass over the rows.

Shapes in the emitted code: R rows of B samples, D columns, P chunks of consecutive rows of one sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.derivative import differentiate
from moefx.codegen.emit import call, render
from moefx.codegen.kernels.token_program import NORM, SHAPES, TokenProgram
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, digest
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class TokenGradSpec(Kernel):
    """The gradients of ``out[r] = program(z0[r], operands)`` for ``grad`` of ``out``.

    ``drow`` is that of the row itself, through the norm if there is one and with ``adds`` increased by another gradient
    of the row. Rows and tokens have gradients of their own; those of samples and columns are stored as one partial sum
    per chunk, so that no order of additions is left to chance.

    ``place`` says where rows lie: ``gather``: row r is ``x[index[r]]``; ``scatter``: its gradient is
    ``grad[index[r]]``; ``here``: neither is elsewhere.
    """

    program: TokenProgram
    place: str = "here"
    adds: bool = False

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"token_grad {self.place} adds={self.adds}\n{self.program.text}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        p = self.program
        return f"token_grad_{self.place}_{p.norm or 'plain'}_{p.features}_{p.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: a program walks over the rows of a chunk and keeps the sums over them."""
        return self.program.tiles(target)

    @property
    def reads_rows(self) -> bool:
        """Whether the gradients depend on the rows themselves; else they are not read."""
        return bool(self.program.norm) or "z0" in differentiate(self.program.program, with_value=False).reads

    @property
    def own(self) -> list[int]:
        """Numbers of the operands whose gradient has a row of its own."""
        return [i for i, kind in enumerate(self.program.operands, 1) if kind in ("row", "token")]

    @property
    def parameters(self) -> list[str]:
        """Names of the tensors that ``launch`` takes, in order."""
        p = self.program
        inputs = ["grad", "x", *(["index"] if self.place != "here" else []), *(["added"] if self.adds else [])]
        outputs = ["drow", *(f"d{i}" for i in self.own), *(["partial"] if p.reduced else [])]
        return [*inputs, *p.names, *outputs]

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        p = self.program
        derivative = differentiate(p.program, with_value=False)
        kinds, grads = dict(enumerate(p.operands, 1)), derivative.printed_grads()
        return render(
            TEMPLATE,
            title=f"{self.name}: gradient of an expression over rows.",
            meaning="drow, d1, d2, ... from grad; a partial sum per chunk where a gradient is summed over rows",
            facts=f"D = {p.features}; {schedule.num_warps} warps per row.",
            helpers=[_templates.HELPERS[name] for name in derivative.helpers],
            names=self.parameters,
            signature=call("def launch", [*self.parameters, "samples", "chunks", "chunk_rows"], ":"),
            comments=self._comments(),
            place=self.place,
            grad_row="token" if self.place == "scatter" else "row",
            x_row="token" if self.place == "gather" else "row",
            adds=self.adds,
            norm=p.norm,
            reads_row=self.reads_rows,
            eps=repr(p.eps),
            pad="        ",
            n=p.features,
            block=p.block,
            masked=p.is_masked,
            mask=f", mask=col < {p.features}" if p.is_masked else "",
            other=f", mask=col < {p.features}, other=0.0" if p.is_masked else "",
            own=[(i, kinds[i]) for i in self.own],
            reduced=list(enumerate(p.reduced)),
            common=p.loads(("sample", "column"), p.is_masked, "sample", derivative.reads),
            loads=p.loads(("row", "token"), p.is_masked, read=derivative.reads),
            statements=derivative.triton(),
            grads=grads,
            # Past the end of a row gradients may be anything: they are left out of sums over it.
            kept=[f"tl.where(col < {p.features}, {one}, 0.0)" if p.is_masked else one for one in grads],
            num_warps=schedule.num_warps,
        )

    def _comments(self) -> dict[str, str]:
        """Return what each tensor of the kernel is."""
        p = self.program
        rows = f"{p.dtype} [R, D]"
        places = {"grad": "[T, D]" if self.place == "scatter" else "[R, D]"}
        found = {"grad": f"{p.out_dtype} {places['grad']}", "index": "int64 [R]", "added": rows, "drow": rows}
        found["x"] = f"{p.dtype} {'[T, D]' if self.place == 'gather' else '[R, D]'}"
        found |= {f"z{i}": SHAPES[kind] for i, kind in enumerate(p.operands, 1)}
        found |= {f"d{i}": SHAPES[p.operands[i - 1]] for i in self.own}
        return found | {"partial": f"float32 [P, {len(p.reduced)}, D]"}

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        p, item, flat = self.program, TRITON_TYPES[self.program.dtype], 8 * rows
        small: list[Any] = [item, [rows, p.features]]
        large = [item, [flat, p.features]]
        grad = [TRITON_TYPES[p.out_dtype], (large if self.place == "scatter" else small)[1]]
        given = [grad, large if self.place == "gather" else small]
        given += [["i64", [rows]]] if self.place != "here" else []
        given += [small] if self.adds else []
        shapes = p.argument_shapes(rows, item)
        given += [*shapes, small, *(shapes[i - 1] for i in self.own)]
        given += [["fp32", [6, len(p.reduced), p.features]]] if p.reduced else []
        return [*given, 2, 3, rows]


TEMPLATE = (
    '''@triton.jit
def kernel(
{% for name in names %}
    {{ name }}_ptr,  # {{ comments[name] }}
{% endfor %}
    grad_stride,
    x_stride,
    sample_rows,  # R / B
    chunks,  # of one sample
    chunk_rows,
):
    """Walk over one chunk of the rows of one sample: sums over its rows stay in registers, in one order."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    start = program % chunks * chunk_rows
    count = tl.minimum(sample_rows - start, chunk_rows)
    col = tl.arange(0, {{ block }})
{% for load in common %}
    {{ load }}
{% endfor %}
{% for j, i in reduced %}
    sum{{ i }} = tl.zeros(({{ block }},), tl.float32)
{% endfor %}
    for step in range(count):
        row = sample * sample_rows + start + step
{% if place != "here" %}
        token = tl.load(index_ptr + row)
{% endif %}
        g = tl.load(grad_ptr + {{ grad_row }} * grad_stride + col{{ other }}).to(tl.float32)
{% if reads_row %}
        x = tl.load(x_ptr + {{ x_row }} * x_stride + col{{ other }}).to(tl.float32)
'''
    + NORM
    + '''{% endif %}
{% for load in loads %}
        {{ load }}
{% endfor %}
{% for statement in statements %}
        {{ statement }}
{% endfor %}
{% for i, kind in own %}
{% if kind == "token" %}
        tl.store(d{{ i }}_ptr + row, tl.sum({{ kept[i] }}, 0))
{% else %}
        tl.store(d{{ i }}_ptr + row * {{ n }} + col, {{ grads[i] }}.to(d{{ i }}_ptr.dtype.element_ty){{ mask }})
{% endif %}
{% endfor %}
{% for j, i in reduced %}
        sum{{ i }} += {{ grads[i] }}
{% endfor %}
{% if norm %}
        drow = {{ kept[0] }}
        along = tl.sum(drow * z0, 0) * {{ 1 / n }}
        drow = (drow - {{ "tl.sum(drow, 0) * %r - " % (1 / n) if norm == "layer" }}z0 * along) * factor
{% else %}
        drow = {{ grads[0] }}
{% endif %}
{% if adds %}
        drow += tl.load(added_ptr + row * {{ n }} + col{{ other }}).to(tl.float32)
{% endif %}
        tl.store(drow_ptr + row * {{ n }} + col, drow.to(drow_ptr.dtype.element_ty){{ mask }})
{% for j, i in reduced %}
    tl.store(partial_ptr + (program * {{ reduced | length }} + {{ j }}) * {{ n }} + col, sum{{ i }}{{ mask }})
{% endfor %}


{{ signature }}
    """Write the gradients; ``chunks`` of ``chunk_rows`` rows cover the rows of each sample."""
    kernel[(samples * chunks,)](
{% for name in names %}
        {{ name }},
{% endfor %}
        grad.stride(0),
        x.stride(0),
        drow.shape[0] // samples,
        chunks,
        chunk_rows,
        num_warps={{ num_warps }},
    )
'''
)

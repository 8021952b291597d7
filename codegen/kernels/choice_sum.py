"""The rows of each token added up, where experts chose their tokens; and what the rows get of its gradient.

Shapes in the emitted code: T tokens of B samples, E experts, R rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.emit import call, operand_loads, printed, render
from moefx.codegen.kernels.tiles import column_tiles
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import TRITON_TYPES, Kernel, digest, require_dtype
from moefx.codegen.targets import Target


@dataclass(frozen=True)
class ChoiceSumSpec(Kernel):
    """``out[t] = sum over the rows r of token t of weights[r] * rows[r]``, by expert, accumulated in float32.

    A token without rows gets zero. Without weights it is the plain sum: the gradient of tokens that experts took.
    ``tail``, ``operands`` and ``keep`` are those of :class:`moefx.codegen.spec.CombineSpec`.
    """

    features: int
    dtype: str
    weighted: bool = True
    tail: Pointwise = field(default_factory=Pointwise)
    operands: tuple[str, ...] = ()
    keep: bool = False

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        if len(self.operands) + 1 != self.tail.inputs:
            found = f"{self.tail.inputs} inputs of its tail and {len(self.operands)} operands"
            raise CannotLower("emit a sum over experts", found=found)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        words = f"choice_sum D={self.features} dtype={self.dtype} weighted={self.weighted} keep={self.keep}"
        return "\n".join([f"{words} {' '.join(self.operands)}", self.tail.text()])

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        words = ["choice", "combine" if self.weighted else "sum"]
        words += ["add"] if self.operands else []
        words += ["keeping"] if self.keep else []
        return "_".join([*words, str(self.features), self.dtype, digest(self.text)[:10]])

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: one token and up to 1024 columns per program."""
        return column_tiles(self.features)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        n, columns, tail = self.features, schedule.block_n, self.tail
        masked = n % columns != 0
        z = [f"z{i + 1}" for i in range(len(self.operands))]
        given = ["rows", *(["weights"] if self.weighted else []), "first", "chain", *z, "out"]
        given += ["kept"] if self.keep else []
        last = ["first.shape[1]", *(["sample_tokens"] if "sample" in self.operands else [])]
        last.append(f"num_warps={schedule.num_warps}")
        return render(
            SUM,
            title=f"{self.name}: the rows of each token, {'weighted and ' if self.weighted else ''}added up.",
            meaning=f"out[t] = sum over the rows r of token t of {'weights[r] * ' if self.weighted else ''}rows[r]",
            facts=f"D = {n}; {columns} columns per program, {schedule.num_warps} warps.",
            helpers=[_templates.HELPERS[name] for name in tail.helpers],
            operands=self.operands,
            shapes={"row": "[T, D]", "sample": "[B, D]", "column": "[D]"},
            loads=operand_loads(self.operands, n, "token", "token // sample_tokens", masked),
            statements=tail.triton(),
            result=printed(tail),
            dtype=self.dtype,
            weighted=self.weighted,
            keep=self.keep,
            n=n,
            columns=columns,
            mask=f", mask=col < {n}" if masked else "",
            other=f", mask=col < {n}, other=0.0" if masked else "",
            signature=call("def launch", given, ":"),
            start=call(f"kernel[(out.shape[0], {-(-n // columns)})]", [*given, *last], indent="    "),
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, n = TRITON_TYPES[self.dtype], self.features
        leading = {"row": [rows], "sample": [2], "column": []}
        found: list[Any] = [[item, [rows, n]], *([["fp32", [rows]]] if self.weighted else [])]
        found += [["i32", [rows, experts]], ["i32", [rows]]]
        found += [[item, [*leading[kind], n]] for kind in self.operands]
        return [*found, *[[item, [rows, n]]] * (1 + self.keep)]


@dataclass(frozen=True)
class ChoiceGradSpec(Kernel):
    """``rows_grad[r] = weights[r] * grad[t]`` and ``weights_grad[r] = <rows[r], grad[t]>`` for row r of token t."""

    features: int
    dtype: str

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"choice_grad D={self.features} dtype={self.dtype}"

    @property
    def name(self) -> str:
        """A readable name."""
        return f"choice_grad_{self.features}_{self.dtype}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: one row per program, which walks over up to 1024 of its columns at a time."""
        return column_tiles(self.features)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        n, columns = self.features, schedule.block_n
        masked = n % columns != 0
        return render(
            GRAD,
            title=f"{self.name}: gradients of rows and weights of a sum by token.",
            meaning="rows_grad[r] = weights[r] * grad[t], weights_grad[r] = <rows[r], grad[t]>, t the token of row r",
            facts=f"D = {n}; {columns} columns at a time, {schedule.num_warps} warps.",
            helpers=[],
            dtype=self.dtype,
            n=n,
            columns=columns,
            mask=f", mask=start + col < {n}" if masked else "",
            other=f", mask=start + col < {n}, other=0.0" if masked else "",
            num_warps=schedule.num_warps,
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        wide, flat = [TRITON_TYPES[self.dtype], [rows, self.features]], ["fp32", [rows]]
        return [wide, wide, flat, ["i64", [rows]], wide, flat]


SUM = '''@triton.jit
def kernel(
    rows_ptr,  # {{ dtype }} [R, D]
{% if weighted %}
    weights_ptr,  # float32 [R]
{% endif %}
    first_ptr,  # int32 [T, E], a row of each token and expert; -1: none
    chain_ptr,  # int32 [R], another row of the same token and expert; -1: none
{% for kind in operands %}
    z{{ loop.index }}_ptr,  # {{ dtype }} {{ shapes[kind] }}, contiguous
{% endfor %}
    out_ptr,  # {{ dtype }} [T, D]
{% if keep %}
    kept_ptr,  # {{ dtype }} [T, D], the sum alone
{% endif %}
    experts,
{% if "sample" in operands %}
    sample_tokens,  # T / B
{% endif %}
):
    """One token and {{ columns }} columns: experts are added in order, so the result does not depend on scheduling."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * {{ columns }} + tl.arange(0, {{ columns }})
    total = tl.zeros(({{ columns }},), tl.float32)
    for expert in range(experts):
        row = tl.load(first_ptr + token * experts + expert)
        while row >= 0:
            value = tl.load(rows_ptr + row.to(tl.int64) * {{ n }} + col{{ other }}).to(tl.float32)
            total += {{ "tl.load(weights_ptr + row) * " if weighted }}value
            row = tl.load(chain_ptr + row)
{% if keep %}
    tl.store(kept_ptr + token * {{ n }} + col, total.to(kept_ptr.dtype.element_ty){{ mask }})
{% endif %}
{% if operands %}

    # What follows in the model, in float32.
    z0 = total
{% for load in loads %}
    {{ load }}
{% endfor %}
{% for statement in statements %}
    {{ statement }}
{% endfor %}
    total = {{ result }}
{% endif %}
    tl.store(out_ptr + token * {{ n }} + col, total.to(out_ptr.dtype.element_ty){{ mask }})


{{ signature }}
    """Write ``out``{{ " and ``kept``" if keep }} [T, D]."""
{% if "sample" in operands %}
    sample_tokens = out.shape[0] // z{{ operands.index("sample") + 1 }}.shape[0]
{% endif %}
{{ start }}
'''

GRAD = '''@triton.jit
def kernel(
    grad_ptr,  # {{ dtype }} [T, D]
    rows_ptr,  # {{ dtype }} [R, D]
    weights_ptr,  # float32 [R]
    tokens_ptr,  # int64 [R], the token of each row; T or more: none
    rows_grad_ptr,  # {{ dtype }} [R, D]
    weights_grad_ptr,  # float32 [R]
    tokens,
    grad_stride,
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, {{ columns }})
    token = tl.load(tokens_ptr + row)
    if (token < 0) | (token >= tokens):
        for start in range(0, {{ n }}, {{ columns }}):
            nothing = tl.zeros(({{ columns }},), rows_grad_ptr.dtype.element_ty)
            tl.store(rows_grad_ptr + row * {{ n }} + start + col, nothing{{ mask }})
        tl.store(weights_grad_ptr + row, 0.0)
        return

    weight = tl.load(weights_ptr + row)
    total = tl.zeros(({{ columns }},), tl.float32)
    for start in range(0, {{ n }}, {{ columns }}):
        at = start + col
        grad = tl.load(grad_ptr + token * grad_stride + at{{ other }}).to(tl.float32)
        value = tl.load(rows_ptr + row * {{ n }} + at{{ other }}).to(tl.float32)
        tl.store(rows_grad_ptr + row * {{ n }} + at, (weight * grad).to(rows_grad_ptr.dtype.element_ty){{ mask }})
        total += grad * value
    tl.store(weights_grad_ptr + row, tl.sum(total, 0))


def launch(grad, rows, weights, tokens, rows_grad, weights_grad):
    """Write ``rows_grad`` [R, D] and ``weights_grad`` float32 [R]; nothing reaches a row without a token."""
    kernel[(rows.shape[0],)](
        grad,
        rows,
        weights,
        tokens,
        rows_grad,
        weights_grad,
        grad.shape[0],
        grad.stride(0),
        num_warps={{ num_warps }},
    )
'''

"""The router in one kernel: logits, scores, the choice of experts, gates; and the gradient of all that to the logits.

Logits accumulate in float32. Tensor cores take bfloat16 tokens and a float32 weight exactly: the weight is split in
three bfloat16 parts, whose sum it is. Between equal scores the lowest expert wins, as in a stable sort.

Shapes in the emitted code: T tokens, D width, E experts, K chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen import _templates
from moefx.codegen.emit import render
from moefx.codegen.kernels.router_text import ORDER, ROUTER, ROUTER_GRAD
from moefx.codegen.kernels.tiles import power_of_two
from moefx.codegen.pointwise import Arg, spell
from moefx.codegen.reasons import CannotLower
from moefx.codegen.row_derivative import RowDerivative, differentiate
from moefx.codegen.rows import RowProgram, helpers, statements
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, TRITON_TYPES, Kernel, digest, require_dtype
from moefx.codegen.targets import Target

#: Most experts whose row stays in registers.
MOST_EXPERTS = 256
SHAPES = {"row": "[T, E]", "sample": "[B, E]", "column": "[E]", "scalar": "[1]"}


@dataclass(frozen=True)
class RouterSpec(Kernel):
    """``index, outputs = program(x @ weight.T)`` for every token, in one launch."""

    program: RowProgram
    width: int
    dtype: str
    weight_dtype: str = "float32"
    #: A 16-bit dtype that the product is rounded to, as the one that this kernel stands for does.
    rounded: str | None = None
    #: Whether the product alone is stored too, for the backward pass.
    keep: bool = False

    def __post_init__(self) -> None:
        for dtype in (self.dtype, self.weight_dtype):
            require_dtype(dtype)
        if not 1 <= self.program.choice.k <= self.program.experts <= MOST_EXPERTS:
            found = f"the top {self.program.choice.k} of {self.program.experts} experts"
            raise CannotLower("emit a router", found=found, do=f"kernels take up to {MOST_EXPERTS} experts")
        if _columns(self.program) > 2 * MOST_EXPERTS:
            raise CannotLower("emit a router", found=f"groups that take {_columns(self.program)} columns of a tile")

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        words = f"router D={self.width} E={self.program.experts} dtype={self.dtype} weight={self.weight_dtype}"
        return f"{words} rounded={self.rounded} keep={self.keep}\n{self.program.text()}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        size = f"{self.width}x{self.program.experts}_top{self.program.choice.k}"
        return f"router{'_keeping' if self.keep else ''}_{size}_{self.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: a program holds whole rows, so that it chooses by itself."""
        block_k = min(128 // ITEM_BYTES[self.dtype], power_of_two(self.width))
        if target.is_interpreter:
            return Schedule(32, 16, min(64, power_of_two(self.width)), 1, 1, 1)
        columns = _columns(self.program)
        rows, warps = _rows(columns if self.program.choice.limit is None else 2 * columns)
        stage = (rows + columns) * block_k * 4
        return Schedule(rows, 16, block_k, warps, max(1, min(3, target.max_stages, 64 * 1024 // stage)), 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        program, choice = self.program, self.program.choice
        first, rest = program.before_choice()
        numbers, limit = range(len(program.outputs)), _limit(program)
        return render(
            ROUTER,
            title=f"{self.name}: logits, scores, choice and gates of every token.",
            meaning=f"z0 = x @ weight.T; {choice.text}, ties to the lowest expert; then the gates",
            facts=f"D = {self.width}, E = {program.experts}; {schedule.block_m} tokens per program.",
            helpers=[ORDER, *(_templates.HELPERS[name] for name in helpers((*first, *rest)))],
            **_common(program, schedule) | {"block_e": _columns(program)},
            limit=limit,
            lane="expert" if not limit or limit["members"] == limit["size"] else "lane",
            d=self.width,
            dtype=self.dtype,
            weight_dtype=self.weight_dtype,
            parts=self.dtype == "bfloat16" and self.weight_dtype == "float32",
            same=self.dtype == self.weight_dtype,
            rounded=self.rounded and f"tl.{self.rounded}",
            keep=self.keep,
            block_k=schedule.block_k,
            mask_k=self.width % schedule.block_k != 0,
            num_stages=schedule.num_stages,
            first=statements(first),
            rest=statements(rest),
            scores=_shaped(choice.scores),
            outputs=[(kind, _shaped(value)) for kind, value in program.outputs],
            has_rows=self.keep or any(kind == "wide" for kind, _ in program.outputs),
            results=[*(f"out{i}" for i in numbers), *(["kept"] if self.keep else [])],
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        program = self.program
        found: list[Any] = [[TRITON_TYPES[self.dtype], [rows, self.width]]]
        found += [[TRITON_TYPES[self.weight_dtype], [program.experts, self.width]], *_operands(program, rows)]
        found += [["i64", [rows, program.choice.k]], *(_output(program, rows, kind) for kind, _ in program.outputs)]
        return [*found, *([_output(program, rows, "wide")] if self.keep else []), False]


@dataclass(frozen=True)
class RouterGradSpec(Kernel):
    """Gradient of a router's product and operands, ``[T, E]`` each, given those of some of its outputs."""

    program: RowProgram
    seeds: tuple[int, ...]
    #: Which of the inputs ``z0, z1, ...`` want a gradient.
    wanted: tuple[int, ...] = (0,)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"router_grad seeds={self.seeds} wanted={self.wanted} E={self.program.experts}\n{self.program.text()}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"router_grad_{self.program.experts}_top{self.program.choice.k}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: fewer tokens than forward, since more values of a row are alive; no product needs 16."""
        rows = 32 if target.is_interpreter else max(8, min(32, 1024 // power_of_two(self.program.experts)))
        warps = 1 if target.is_interpreter else 4
        return Schedule(rows, 16, 16, warps, 1, 1)

    def derivative(self) -> RowDerivative:
        """Return what the kernel computes."""
        return differentiate(self.program, self.seeds)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        program, derivative = self.program, self.derivative()
        return render(
            ROUTER_GRAD,
            title=f"{self.name}: gradient of a router to its logits.",
            meaning="d0 = gradient of x @ weight.T, and of the operands, for those of the outputs",
            facts=f"E = {program.experts}; {schedule.block_m} tokens per program.",
            helpers=[_templates.HELPERS[name] for name in helpers(derivative.steps)],
            **_common(program, schedule, {str(a) for step in derivative.steps for a in step.args}),
            seeds=[(i, program.outputs[i][0]) for i in self.seeds],
            seed_names=[f"g{i}" for i in self.seeds],
            wanted=self.wanted,
            wanted_names=[f"d{i}" for i in self.wanted],
            statements=statements(derivative.steps),
            grads=[_shaped(grad) for grad in derivative.grads],
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        program = self.program
        wide = _output(program, rows, "wide")
        seeds = [_output(program, rows, program.outputs[i][0]) for i in self.seeds]
        found = [wide, *_operands(program, rows), ["i64", [rows, program.choice.k]]]
        return [*found, *seeds, *[wide] * len(self.wanted)]


def _rows(columns: int) -> tuple[int, int]:
    """Return tokens per program and warps, so that a value of every expert takes few registers."""
    return (32, 4) if columns <= 64 else (16, 4 if columns <= 128 else 8)


def _limit(program: RowProgram) -> dict[str, int] | None:
    """Return the sizes of a limit to groups: groups and members of each in the tile, and what there is of them."""
    limit = program.choice.limit
    if limit is None:
        return None
    size = program.experts // limit.groups
    members = power_of_two(size, 1)
    sizes = {"groups": power_of_two(limit.groups, max(1, 16 // members)), "members": members}
    return {**sizes, "count": limit.groups, "size": size, "keep": limit.keep, "best": min(limit.best, size)}


def _columns(program: RowProgram) -> int:
    """Return the columns of a tile of the forward kernel: every group of experts has a power of two of them."""
    limit = _limit(program)
    return power_of_two(program.experts) if limit is None else limit["groups"] * limit["members"]


def _common(program: RowProgram, schedule: Schedule, used: set[str] | None = None) -> dict[str, Any]:
    """Return what both templates read; of the operands, those in ``used`` are loaded."""
    loads = [
        _load(i, kind, program.experts) for i, kind in enumerate(program.operands, 1) if used is None or f"z{i}" in used
    ]
    return {
        "operands": program.operands,
        "names": [f"z{i + 1}" for i in range(len(program.operands))],
        "shapes": SHAPES,
        "experts": program.experts,
        "k": program.choice.k,
        "block_m": schedule.block_m,
        "block_e": power_of_two(program.experts),
        "num_warps": schedule.num_warps,
        "loads": loads,
    }


def _load(i: int, kind: str, experts: int) -> str:
    """Return the statement that reads an operand as a whole tile."""
    rows = {"row": "source", "sample": "(source // sample_tokens)"}
    if kind in rows:
        return f"z{i} = tl.load(z{i}_ptr + {rows[kind]}[:, None] * {experts} + column[None, :]).to(tl.float32)"
    value = f"tl.load(z{i}_ptr)" if kind == "scalar" else f"tl.load(z{i}_ptr + column)[None, :]"
    return f"z{i} = {value}.to(tl.float32) + tl.zeros_like(z0)"


def _shaped(value: Arg) -> str:
    """Return a value as a whole tile: it may be a number."""
    return value if isinstance(value, str) else f"tl.zeros_like(z0) + {spell(value)}"


def _operands(program: RowProgram, rows: int) -> list[Any]:
    experts = program.experts
    shapes = {"row": [rows, experts], "sample": [2, experts], "column": [experts], "scalar": [1]}
    return [["fp32", shapes[kind]] for kind in program.operands]


def _output(program: RowProgram, rows: int, kind: str) -> list[Any]:
    return ["fp32", [rows, program.choice.k if kind == "slot" else program.experts]]

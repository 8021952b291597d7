"""Programs over rows: an expression whose operands belong to rows, samples, columns or tokens.

Shapes in the emitted code: R rows of B samples, D columns; ``z0`` is the row itself, ``z1, z2, ...`` what joins it.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from moefx.codegen.emit import operand_loads
from moefx.codegen.kernels.tiles import power_of_two
from moefx.codegen.pointwise import Arg, Pointwise
from moefx.codegen.reasons import CannotLower
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import require_dtype
from moefx.codegen.targets import Target

#: How the shape of an operand of each kind reads.
SHAPES = {"row": "[R, D]", "sample": "[B, D]", "column": "[D]", "token": "[R]"}
#: A row stays in registers while its sums are formed; wider ones do not.
WIDEST = 8192


@dataclass(frozen=True)
class TokenProgram:
    """``out[r] = program(z0[r], operands)``, where ``z0`` may be the row after a norm without weights.

    ``operands`` names the kind of each other input: ``row`` [R, D], ``sample`` [B, D], ``column`` [D], or ``token``
    [R], one float32 number per row. The same program has its gradient in `moefx.codegen.kernels.token_grad`.
    """

    features: int
    dtype: str
    program: Pointwise = field(default_factory=Pointwise)
    operands: tuple[str, ...] = ()
    #: "layer", "rms" or, for none, "".
    norm: str = ""
    eps: float = 0.0
    #: Dtype of the result, where it is not that of the row.
    result: str = ""

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        require_dtype(self.out_dtype)
        if self.norm and self.features > WIDEST:
            raise CannotLower("emit a norm", found=f"rows of {self.features} values, which do not fit into registers")
        if len(self.operands) + 1 != self.program.inputs:
            found = f"{self.program.inputs} inputs and {len(self.operands)} operands"
            raise CannotLower("emit an expression over rows", found=found)

    @property
    def out_dtype(self) -> str:
        """Dtype of the result."""
        return self.result or self.dtype

    @property
    def reduced(self) -> list[int]:
        """Which operands have a gradient that is summed over rows; ``z1`` is number 1."""
        return [i for i, kind in enumerate(self.operands, 1) if kind in ("sample", "column")]

    @property
    def text(self) -> str:
        """The complete description; equal text means the same program."""
        words = f"rows D={self.features} dtype={self.dtype} {self.out_dtype} norm={self.norm or None} eps={self.eps!r}"
        return "\n".join([f"{words} {' '.join(self.operands)}", self.program.text()])

    @property
    def block(self) -> int:
        """The power of two that holds a row."""
        return power_of_two(self.features)

    @property
    def is_masked(self) -> bool:
        """Whether the block is wider than a row."""
        return self.block != self.features

    def tiles(self, target: Target) -> Schedule:
        """Return the tiles of a kernel whose programs hold one row each: about eight values per thread."""
        warps = 1 if target.is_interpreter else max(1, min(16, self.block // 256))
        return Schedule(1, self.block, 16, warps, 1, 1)

    @property
    def names(self) -> list[str]:
        """Names of the operands."""
        return [f"z{i}" for i in range(1, self.program.inputs)]

    @property
    def first_sample(self) -> str:
        """Name of an operand with one row per sample, from which a kernel knows their number; or nothing."""
        return f"z{self.operands.index('sample') + 1}" if "sample" in self.operands else ""

    def loads(
        self, kinds: tuple[str, ...], masked: bool, sample: str = "row // sample_rows", read: Container[Arg] = ()
    ) -> list[str]:
        """Return the statements that load the operands of some kinds for row ``row`` of sample ``sample``.

        ``read`` names those that are needed; nothing stands for all.
        """
        every = zip(
            self.names, operand_loads(self.operands, self.features, "row", sample, masked), self.operands, strict=True
        )
        return [line for name, line, kind in every if kind in kinds and (not read or name in read)]

    def argument_shapes(self, rows: int, item: str) -> list[list[object]]:
        """Return ``[Triton type, shape]`` of every operand for so many rows of two samples."""
        shapes = {"row": [rows, self.features], "sample": [2, self.features], "column": [self.features]}
        return [["fp32", [rows]] if kind == "token" else [item, shapes[kind]] for kind in self.operands]


#: The row ``x`` in float32 becomes ``z0``, ``x * factor`` where there is a norm.
NORM = """{% if norm == "layer" %}
{{ pad }}mean = tl.sum(x, 0) * {{ 1 / n }}
{{ pad }}x = {{ "tl.where(col < %d, x - mean, 0.0)" % n if masked else "x - mean" }}
{% endif %}
{% if norm %}
{{ pad }}factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) * {{ 1 / n }} + {{ eps }})
{{ pad }}z0 = x * factor
{% else %}
{{ pad }}z0 = x
{% endif %}
"""

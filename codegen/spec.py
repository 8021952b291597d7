"""What a kernel computes, apart from how: the unit that is hashed, scheduled, emitted and dumped.

Shapes: T tokens, k slots per token, R = T * k routed rows, E experts, K input columns, N output columns.
R, T and E are not part of a spec: one kernel serves every batch and every load.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower

if TYPE_CHECKING:
    from moefx.codegen.schedule import Schedule
    from moefx.codegen.targets import Target

#: Storage dtypes that kernels read and write, with their size in bytes.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


#: The same dtypes in Triton's spelling.
TRITON_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def require_dtype(dtype: str) -> None:
    """Refuse a dtype that kernels do not store."""
    if dtype not in ITEM_BYTES:
        raise CannotLower("emit a kernel", found=f"dtype {dtype}", do=f"kernels take {', '.join(sorted(ITEM_BYTES))}")


@dataclass(frozen=True)
class LinearSpec:
    """``out[r] = epilogue(weight[e(r)] @ x[source(r)] + bias[e(r)])`` for the R rows sorted by expert.

    ``source(r)`` is ``order[r] // top_k`` with ``gather``, else ``r``.  An epilogue of two inputs (gated FFNs) reads
    two projections of the same row: two weights of N rows each if ``weights`` is 2, else the halves of one weight of
    2 N rows.  Dropped rows are written as zero.
    """

    in_features: int
    out_features: int
    dtype: str
    bias: bool = False
    gather: bool = False
    top_k: int = 1
    epilogue: Pointwise = field(default_factory=Pointwise)
    weights: int = 1
    #: "ieee" or "tf32": how float32 products are formed on tensor cores; 16-bit inputs do not look at it.
    precision: str = "ieee"
    #: Whether what goes into the epilogue is stored too, for the backward pass: [R, N] per accumulator, side by side.
    keep: bool = False

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        if min(self.in_features, self.out_features, self.top_k) < 1:
            raise CannotLower(
                "emit a grouped projection", found=f"an empty one: {self.in_features}x{self.out_features}"
            )

        if self.weights not in (1, self.epilogue.inputs):
            found = f"{self.weights} weights and an epilogue of {self.epilogue.inputs} inputs"
            raise CannotLower("emit a grouped projection", found=found)

    @property
    def halves(self) -> int:
        """Number of accumulators: 2 where the epilogue reads a gate and an up value."""
        return self.epilogue.inputs

    @property
    def weight_rows(self) -> int:
        """Number of rows of each weight."""
        return self.out_features * self.halves // self.weights

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        parts = [
            f"grouped_linear K={self.in_features} N={self.out_features} dtype={self.dtype} bias={self.bias}",
            f"gather={self.gather} top_k={self.top_k if self.gather else 1} precision={self.precision}",
            f"weights={self.weights} of {self.weight_rows} rows",
            self.epilogue.text(),
        ]
        parts += ["keep"] if self.keep else []
        return "\n".join(parts)

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        words = ["gather"] if self.gather else []
        words.append("gated" if self.halves == 2 else "grouped")
        words += ["keeping"] if self.keep else []
        words += ["linear", f"{self.in_features}x{self.out_features}", self.dtype, digest(self.text)[:10]]
        return "_".join(words)


@dataclass(frozen=True)
class CombineSpec:
    """``out[t] = sum over slots of weights[t, slot] * rows[position(t, slot)]``, accumulated in float32.

    Without weights it is the plain sum: the gradient of tokens that were gathered once per slot.  What follows it in
    the model, such as a shared expert, a gate per sample and the residual, is ``tail``: its ``z0`` is the sum, and its
    other inputs are tensors of the kinds in ``operands``.
    """

    features: int
    top_k: int
    dtype: str
    weighted: bool = True
    tail: Pointwise = field(default_factory=Pointwise)
    #: "row" [T, D], "sample" [B, D] or "column" [D], for each input of the tail but the first.
    operands: tuple[str, ...] = ()
    #: Whether the sum itself is stored too, for the gradient of the tail: [T, D].
    keep: bool = False

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        if len(self.operands) + 1 != self.tail.inputs:
            found = f"{self.tail.inputs} inputs of its tail and {len(self.operands)} operands"
            raise CannotLower("emit a combine", found=found)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        verb = "combine" if self.weighted else "sum"
        text = f"{verb} D={self.features} top_k={self.top_k} dtype={self.dtype}{' keep' if self.keep else ''}"
        return text if not self.operands else f"{text} {' '.join(self.operands)}\n{self.tail.text()}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        verb = "combine" if self.weighted else "sum"
        verb += "_add" if self.operands else ""
        verb += "_keeping" if self.keep else ""
        return f"{verb}_{self.features}_top{self.top_k}_{self.dtype}_{digest(self.text)[:10]}"


class Kernel(ABC):
    """A kernel in a file of its own (`moefx.codegen.kernels`): what it computes, its schedule and its text."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""

    @abstractmethod
    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles for a target and a load; ``block_m`` is that of the tile map, where one is read."""

    def candidates(self, target: Target, load: int, block_m: int) -> tuple[Schedule, ...]:
        """Return the tiles to choose from, those of :meth:`schedule` first; a faulty one is passed over."""
        return (self.schedule(target, load, block_m),)

    @abstractmethod
    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""

    @abstractmethod
    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes: ``[Triton type, shape]`` of a tensor, or a number."""

    def with_dtype(self, dtype: str | None) -> Kernel:
        """Return the same kernel for tokens of another dtype, where it has one; ``None`` keeps it."""
        return self if dtype is None or not hasattr(self, "dtype") else dataclasses.replace(self, dtype=dtype)  # type: ignore[type-var]


#: What :func:`moefx.codegen.emit.emit` prints.
KernelSpec = LinearSpec | CombineSpec | Kernel


@dataclass(frozen=True)
class RegionSpec:
    """A chain of grouped projections over one routing, and the combine that ends it if there is one."""

    linears: tuple[LinearSpec, ...]
    combine: CombineSpec | None = None
    #: Whether the positions of pairs and the row tiles are given, by the kernels that grouped the rows.
    placed: bool = False

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """The kernels of the region in the order in which they run."""
        return (*self.linears, self.combine) if self.combine else self.linears

    @property
    def saves(self) -> tuple[bool, ...]:
        """Which projections' results, before their epilogue, the backward pass reads."""
        ends = [(self.combine is not None and len(self.linears) == 1) or not self.linears[-1].epilogue.is_identity]
        return (*[True] * (len(self.linears) - 1), *ends)

    @property
    def reads_order(self) -> bool:
        """Whether the region reads the order of rows: to gather its input, or to combine its output."""
        return self.linears[0].gather or self.combine is not None

    @property
    def key(self) -> str:
        """Content hash; names the region in graphs."""
        return digest("\n\n".join([*(kernel.text for kernel in self.kernels), *["placed"] * self.placed]))[:16]


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()

"""What a kernel computes, apart from how: the unit that is hashed, scheduled, emitted and dumped.

Shapes: T tokens, k slots per token, R = T * k routed rows, E experts, K input columns, N output columns.
R, T and E are not part of a spec: one kernel serves every batch and every load.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower

#: Storage dtypes that kernels read and write, with their size in bytes.
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _require_dtype(dtype: str) -> None:
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

    def __post_init__(self) -> None:
        _require_dtype(self.dtype)
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
        return "\n".join(parts)

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        words = ["gather"] if self.gather else []
        words.append("gated" if self.halves == 2 else "grouped")
        words += ["linear", f"{self.in_features}x{self.out_features}", self.dtype, digest(self.text)[:10]]
        return "_".join(words)


@dataclass(frozen=True)
class CombineSpec:
    """``out[t] = sum over slots of weights[t, slot] * rows[position(t, slot)]``, accumulated in float32."""

    features: int
    top_k: int
    dtype: str

    def __post_init__(self) -> None:
        _require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"combine D={self.features} top_k={self.top_k} dtype={self.dtype}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"combine_{self.features}_top{self.top_k}_{self.dtype}_{digest(self.text)[:10]}"


#: What :func:`moefx.codegen.emit.emit` prints.
KernelSpec = LinearSpec | CombineSpec


@dataclass(frozen=True)
class RegionSpec:
    """A chain of grouped projections over one routing, and the combine that ends it if there is one."""

    linears: tuple[LinearSpec, ...]
    combine: CombineSpec | None = None

    @property
    def kernels(self) -> tuple[KernelSpec, ...]:
        """The kernels of the region in the order in which they run."""
        return (*self.linears, self.combine) if self.combine else self.linears

    @property
    def reads_order(self) -> bool:
        """Whether the region reads the order of rows: to gather its input, or to combine its output."""
        return self.linears[0].gather or self.combine is not None

    @property
    def key(self) -> str:
        """Content hash; names the region in graphs."""
        return digest("\n\n".join(kernel.text for kernel in self.kernels))[:16]


def digest(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()

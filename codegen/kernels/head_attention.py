"""Attention in which a query computes only the heads it chose: forward, and the two kernels of its gradient.

Queries are sorted by (sample, head) as routed rows are by expert, and cut into the same tiles.  Keys and values stay
where they are.  A head width that is no power of two is cut into parts that are (72 = 64 + 8, of which 8 is padded to
16), which wastes less than padding the whole to 128.

Shapes in the emitted code: B samples, N queries, M keys, H heads, D head width, R = B * N * H rows, G = B * H groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.kernels.head_attention_text import FORWARD, KEYS, QUERIES, TENSORS
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, TRITON_TYPES, Kernel, digest, require_dtype
from moefx.codegen.targets import Target


def parts_of(width: int) -> list[tuple[int, int, bool]]:
    """Return (start, power of two, whether it is padded) of the parts that a head is cut into."""
    found, start = [], 0
    while start < width:
        size = max(16, 1 << ((width - start).bit_length() - 1))
        found.append((start, size, start + size > width))
        start += size
    return found


@dataclass(frozen=True)
class HeadAttentionSpec(Kernel):
    """``out[r] = gate[r] * softmax(q[r] @ k[group].T * scale) @ v[group]``, and its gradients; zero gates are no rows.

    ``stage`` is ``forward``, ``queries`` (gradients of queries and gates) or ``keys`` (of keys and values). Sums run in
    one order, and every result is written, so repeated runs give the same bits.
    """

    width: int
    heads: int
    dtype: str
    stage: str = "forward"
    precision: str = "ieee"

    def __post_init__(self) -> None:
        require_dtype(self.dtype)

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return f"head_attention {self.stage} D={self.width} H={self.heads} dtype={self.dtype} {self.precision}"

    @property
    def name(self) -> str:
        """A readable name, unique by the hash of :attr:`text`."""
        return f"head_attention_{self.stage}_{self.heads}x{self.width}_{self.dtype}_{digest(self.text)[:10]}"

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: rows of queries and of keys; the accumulators of a whole head stay in registers."""
        if target.is_interpreter:
            return Schedule(block_m, 32, 16, 1, 1, 1)
        wide, single = self.width > 64, ITEM_BYTES[self.dtype] == 4
        if single and self.is_padded and target.has_tma:
            return self._small(block_m)
        # Without wide tensor-core instructions operands take registers too.
        small = wide and not target.has_tma
        if self.stage == "keys":
            return Schedule(16 if small else 32, 32 if single or small else 64, 16, 8 if wide else 4, 1, 1)
        if single or self.stage == "queries":
            return Schedule(min(block_m, 64), 32, 16, 8 if wide else 4, 1, 1)
        return Schedule(min(block_m, 64) if small else block_m, 64, 16, 8, 2, 1)

    def candidates(self, target: Target, load: int, block_m: int) -> tuple[Schedule, ...]:
        """Return the preferred tiles, then smaller ones, then those that load a step more ahead."""
        first = self.schedule(target, load, block_m)
        if target.is_interpreter:
            return (first,)
        rows = max(16, first.block_m // 2)
        fewer = replace(first, block_m=rows)
        smaller = (fewer, replace(fewer, block_n=max(16, first.block_n // 2)))
        ahead = (replace(one, num_stages=one.num_stages + 1) for one in (first, fewer))
        return tuple(dict.fromkeys((first, *smaller, *ahead)))

    @property
    def is_padded(self) -> bool:
        """Whether a part of the head is padded, as 8 of 72 values are: its masks cost registers."""
        return any(padded for _, _, padded in parts_of(self.width))

    @property
    def products(self) -> str:
        """How float32 products are formed: for keys of a padded head exactly, since TensorFloat-32 spills there."""
        return "ieee" if self.stage == "keys" and self.is_padded else self.precision

    def _small(self, block_m: int) -> Schedule:
        """Return the largest tiles of a padded head in float32 that do not spill on sm_90.

        By disassembly, for 72 values: 64x32 spills 16 B forward and 296 B for queries, 32x32 8 B for keys; with
        TensorFloat-32 products 64x32 does not.
        """
        if self.stage == "keys":
            return Schedule(16, 32, 16, 4, 1, 1)
        return Schedule(min(block_m, 32 if self.precision == "ieee" else 64), 32, 16, 8, 1, 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        meaning = {
            "forward": "out[r] = gate[r] * softmax(q[r] @ k.T * scale) @ v over the keys of the row's sample and head",
            "queries": "dq[r] and dgate[r], by recomputing the weights from the stored logarithm of their sum",
            "keys": "dk and dv of every key, summed over the rows of its sample and head",
        }[self.stage]
        return render(
            {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}[self.stage],
            title=f"{self.name}: attention in which every query chooses its heads.",
            meaning=meaning,
            facts=f"D = {self.width}, H = {self.heads}; {schedule.block_m} queries by {schedule.block_n} keys.",
            helpers=[],
            dtype=self.dtype,
            d=self.width,
            heads=self.heads,
            tensors=TENSORS[self.stage],
            parts=[(p, *part) for p, part in enumerate(parts_of(self.width))],
            block_m=schedule.block_m,
            block_n=schedule.block_n,
            num_warps=schedule.num_warps,
            num_stages=schedule.num_stages,
            precision=f', input_precision="{self.products}"' if self.dtype == "float32" else "",
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        item, keys = TRITON_TYPES[self.dtype], 1022
        q = [item, [2, rows, self.heads, self.width]]
        k = [item, [2, keys, self.heads, self.width]]
        flat = 2 * rows * self.heads
        plain: list[Any] = [q, k, k, ["fp32", [2, rows, self.heads]], ["i64", [flat]]]
        groups, lse = ["i64", [2 * self.heads + 1]], ["fp32", [flat]]
        tile_map = ["i32", [3, tiles]]
        if self.stage == "forward":
            return [*plain, tile_map, q, lse, 0.125, False]
        if self.stage == "queries":
            return [*plain, tile_map, q, q, lse, q, lse, lse, 0.125, False]
        return [*plain, groups, q, lse, lse, k, k, 0.125, False]

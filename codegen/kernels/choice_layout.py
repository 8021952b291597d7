"""Where the rows of experts lie that chose their tokens: equal groups, hence no sorting, and the rows of every token.

An expert chose C tokens, so row r belongs to expert ``r // C`` and row tiles are a division away. Which rows a token
has is kept as one number per token and expert: an expert serves a token once, as a rule. If it does twice or more, its
rows for that token are chained, so that none is lost.

Shapes in the emitted code: T tokens, E experts, C tokens of each, R = E * C rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.codegen.emit import render
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import Kernel
from moefx.codegen.targets import Target

_BLOCK = 256


@dataclass(frozen=True)
class ChoiceLayoutSpec(Kernel):
    """``first``, ``chain``, ``order``, ``offsets`` and ``tiles`` of the tokens that experts chose, in one launch."""

    @property
    def text(self) -> str:
        """The complete description; equal text means the same kernel."""
        return "choice_layout"

    @property
    def name(self) -> str:
        """There is one kernel for all models."""
        return self.text

    def schedule(self, target: Target, load: int, block_m: int) -> Schedule:
        """Return the tiles: 256 rows per program."""
        return Schedule(_BLOCK, 16, 16, 4, 1, 1)

    def emit(self, schedule: Schedule) -> str:
        """Return the source of the kernel's module."""
        return render(
            TEMPLATE,
            title="choice_layout: rows, row tiles and the rows of each token, of experts that chose their tokens.",
            meaning="first[t, e] is a row of token t and expert e, chain[r] another of the same two; -1: there is none",
            facts="One kernel for all models.",
            helpers=[],
            block=schedule.block_m,
        )

    def arguments(self, rows: int, experts: int, tiles: int) -> list[Any]:
        """Return what ``launch`` takes for such sizes."""
        flat, table = ["i64", [rows]], ["i32", [rows, experts]]
        return [flat, table, ["i32", [rows]], flat, ["i64", [experts + 1]], ["i32", [3, tiles]], 64]


TEMPLATE = '''@triton.jit
def kernel(
    tokens_ptr,  # int64 [R], the token of each row; T or more: none
    first_ptr,  # int32 [T, E], -1 everywhere
    chain_ptr,  # int32 [R]
    order_ptr,  # int64 [R], the token to read
    offsets_ptr,  # int64 [E + 1], first row of each expert
    map_ptr,  # int32 [3, TILES]: expert, first row, end row of each tile; -1 beyond the last tile
    tokens,
    experts,
    each,  # C
    rows,
    tiles,
    tiles_each,
    BLOCK_M: tl.constexpr,
):
    number = tl.program_id(0) * {{ block }} + tl.arange(0, {{ block }})
    is_row = number < rows
    token = tl.load(tokens_ptr + number, mask=is_row, other=0)
    known = is_row & (token >= 0) & (token < tokens)
    place = first_ptr + token * experts + number // each
    before = tl.atomic_xchg(place, number, mask=known)
    tl.store(chain_ptr + number, tl.where(known, before, -1), mask=is_row)
    # A row without a token reads an existing one; nobody reads the result.
    tl.store(order_ptr + number, tl.minimum(tl.maximum(token, 0), tokens - 1), mask=is_row)
    tl.store(offsets_ptr + number, number.to(tl.int64) * each, mask=number <= experts)

    expert = number // tiles_each
    row = expert * each + number % tiles_each * BLOCK_M
    row_end = tl.minimum(row + BLOCK_M, (expert + 1) * each)
    exists = expert < experts
    is_tile = number < tiles
    tl.store(map_ptr + number, tl.where(exists, expert, -1), mask=is_tile)
    tl.store(map_ptr + tiles + number, tl.where(exists, row, -1), mask=is_tile)
    tl.store(map_ptr + 2 * tiles + number, tl.where(exists, row_end, -1), mask=is_tile)


def launch(tokens, first, chain, order, offsets, tile_map, block_m):
    """Write ``chain``, ``order``, ``offsets`` and ``tile_map``, and into ``first``, which holds -1."""
    rows, experts, tiles = tokens.shape[0], offsets.shape[0] - 1, tile_map.shape[1]
    each = rows // experts
    kernel[(triton.cdiv(max(rows, tiles, experts + 1), {{ block }}),)](
        tokens,
        first,
        chain,
        order,
        offsets,
        tile_map,
        first.shape[0],
        experts,
        each,
        rows,
        tiles,
        triton.cdiv(each, block_m),
        BLOCK_M=block_m,
        num_warps=4,
    )
'''

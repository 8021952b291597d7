"""Folding: identical neighbours of a region tree become one row that says how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moefx.inspect.regions import Region
from moefx.inspect.text import merge_names

_LONGEST_PERIOD = 8


@dataclass
class Row:
    """One line of the folded tree: ``regions`` are all alike, ``repeat`` is how many follow each other.

    A row without regions stands for ``repeat`` repetitions of the sequence of its children.
    """

    regions: list[Region]
    repeat: int = 1
    children: list[Row] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name, with number ranges where the regions differ."""
        return merge_names(list(dict.fromkeys(r.label for r in self.regions)))


def fold_region(region: Region) -> Row:
    """Return the folded tree of ``region``."""
    memo: dict[Any, int] = {}
    return _row([region], 1, memo)


def _row(regions: list[Region], repeat: int, memo: dict[Any, int]) -> Row:
    return Row(regions, repeat, _fold([r.children for r in regions], memo))


def _fold(lists: list[list[Region]], memo: dict[Any, int]) -> list[Row]:
    """Fold lists of regions that are alike position by position."""
    first = lists[0]
    keys = [memo.setdefault(region.signature(), len(memo)) for region in first]
    rows: list[Row] = []
    at = 0
    while at < len(first):
        period, repeat = _repetition(keys, at)
        columns = [
            [regions[at + turn * period + i] for regions in lists for turn in range(repeat)] for i in range(period)
        ]
        if period == 1:
            rows.append(_row(columns[0], repeat, memo))
        else:
            rows.append(Row([], repeat, [_row(column, 1, memo) for column in columns]))
        at += period * repeat
    return rows


def _repetition(keys: Sequence[int], at: int) -> tuple[int, int]:
    """Return (period, repeats) of the longest repetition that starts at ``at``; the shorter period wins a tie."""
    best = (1, 1)
    for period in range(1, min(_LONGEST_PERIOD, (len(keys) - at) // 2) + 1):
        unit, repeat = list(keys[at : at + period]), 1
        while list(keys[at + repeat * period : at + (repeat + 1) * period]) == unit:
            repeat += 1
        if repeat > 1 and period * repeat > best[0] * best[1]:
            best = (period, repeat)
    return best

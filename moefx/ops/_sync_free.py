"""Grouped products for devices on which reading an offset would stall the queue.

Nothing here reads a value: every shape follows from the shapes of the arguments. Two routes:

* ``torch.nn.functional.grouped_mm`` where it is legal and itself free of a host sync: bfloat16, 16-byte strides, CUDA
  of compute capability 9 or 10 (elsewhere torch falls back to a loop over offsets copied to the host);
* otherwise fixed tiles of one expert each. Groups are padded to whole tiles, of which there are at most
  ``R // TILE + E``, and each tile multiplies by the weight that its device-side expert id selects.

Shapes: ``R`` rows, ``E`` groups, ``A`` and ``B`` inner and outer width, ``M`` tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.ops._checks import grouped_mm_takes

TILE = 128


def group_of_row(offsets: Tensor, rows: int) -> Tensor:
    """Return the group of each of ``rows`` sorted rows; rows of the tail get ``E``."""
    return torch.bucketize(torch.arange(rows, device=offsets.device), offsets[1:], right=True)


def rows_times_groups(x_RA: Tensor, weight_EAB: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each row by the matrix of its group; rows of the tail are zero."""
    group_R = group_of_row(offsets, x_RA.shape[0])
    if _grouped_mm_is_legal(x_RA, weight_EAB):
        out_RB = F.grouped_mm(x_RA, weight_EAB, offs=offsets[1:].to(torch.int32))
    else:
        tiles = _Tiles.of(group_R, offsets)
        x_MTA = tiles.scatter(x_RA)
        out_MTB = x_RA.new_empty((tiles.count, TILE, weight_EAB.shape[2]))
        for tile in range(tiles.count):
            weight_AB = weight_EAB.index_select(0, tiles.expert[tile : tile + 1]).squeeze(0)
            torch.mm(x_MTA[tile], weight_AB, out=out_MTB[tile])
        out_RB = tiles.gather(out_MTB)
    # grouped_mm leaves the tail uninitialised: a product with zero would keep a NaN.
    return out_RB.masked_fill_((group_R == weight_EAB.shape[0]).unsqueeze(1), 0)


def groups_of_outer_products(a_RA: Tensor, b_RB: Tensor, offsets: Tensor) -> Tensor:
    """Return ``a[group].T @ b[group]`` for each group, ``[E, A, B]``; zeros for an empty group."""
    groups = offsets.shape[0] - 1
    if _grouped_mm_is_legal(a_RA, b_RB):
        out_EAB = F.grouped_mm(a_RA.t(), b_RB, offs=offsets[1:].to(torch.int32))
        return out_EAB.masked_fill_((offsets.diff() == 0).view(groups, 1, 1), 0)
    tiles = _Tiles.of(group_of_row(offsets, a_RA.shape[0]), offsets)
    wide = torch.promote_types(a_RA.dtype, torch.float32)
    out_EAB = a_RA.new_zeros((groups, a_RA.shape[1], b_RB.shape[1]), dtype=wide)
    a_MTA, b_MTB = tiles.scatter(a_RA), tiles.scatter(b_RB)
    for tile in range(tiles.count):  # one index per call: no two additions race, the sum is deterministic
        product_AB = a_MTA[tile].t() @ b_MTB[tile]
        out_EAB.index_add_(0, tiles.expert[tile : tile + 1], product_AB.to(wide).unsqueeze(0))
    return out_EAB.to(a_RA.dtype)


def group_sums(a_RA: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of the rows of each group, ``[E, A]``, accumulated in at least float32."""
    groups = offsets.shape[0] - 1
    group_R1 = group_of_row(offsets, a_RA.shape[0]).unsqueeze(1)
    membership_RE = (group_R1 == torch.arange(groups, device=a_RA.device)).to(a_RA.dtype)
    # Zeros of the membership do not stop a non-finite value of a row that belongs to no group.
    return membership_RE.t() @ a_RA.masked_fill(group_R1 == groups, 0)


def _grouped_mm_is_legal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == torch.bfloat16 and _has_grouped_kernel(left.device) and grouped_mm_takes(left, right)


def _has_grouped_kernel(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    )


@dataclass(frozen=True)
class _Tiles:
    """A cut of sorted rows into tiles of ``TILE`` rows, each of one group, the last of a group padded with zeros."""

    count: int  # tiles at the bound that the shapes give; the surplus is empty
    place: Tensor  # [R] padded position of each row; rows of the tail share one position past all tiles
    expert: Tensor  # [M] group of each tile

    @classmethod
    def of(cls, group_R: Tensor, offsets: Tensor) -> _Tiles:
        rows, groups = group_R.shape[0], offsets.shape[0] - 1
        count = rows // TILE + groups
        tile_ends_E = ((offsets.diff() + TILE - 1) // TILE).cumsum(0)
        first_tile_E = torch.cat([tile_ends_E.new_zeros(1), tile_ends_E])
        within_R = torch.arange(rows, device=group_R.device) - offsets[group_R]
        place_R = torch.where(group_R < groups, first_tile_E[group_R] * TILE + within_R, count * TILE)
        tile_M = torch.arange(count, device=group_R.device)
        return cls(count, place_R, torch.bucketize(tile_M, tile_ends_E, right=True).clamp(max=groups - 1))

    def scatter(self, x_RA: Tensor) -> Tensor:
        """Return the rows in their tiles, ``[M, TILE, A]``."""
        padded = x_RA.new_zeros(((self.count + 1) * TILE, x_RA.shape[1]))
        return padded.index_copy_(0, self.place, x_RA).view(self.count + 1, TILE, x_RA.shape[1])

    def gather(self, tiles_MTB: Tensor) -> Tensor:
        """Return rows in sorted order; the value of rows of the tail is arbitrary."""
        flat = tiles_MTB.flatten(0, 1)
        return flat.index_select(0, self.place.clamp(max=flat.shape[0] - 1))

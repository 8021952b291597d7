"""Print a grouped projection that loads whole tiles through tensor descriptors (TMA), one program per processor.

The other variant (`moefx.codegen.emit`) gathers rows by pointers and runs one program per tile.  Here rows are first
permuted into expert order, if they are not yet, so that one instruction copies a tile; on Blackwell descriptors gather
rows themselves.  Warps divide into loading and multiplying ones where Triton manages to (``warp_specialize``): Hopper
needs 4 warps, an outer loop that is not flattened and no branch in it; Blackwell needs a flattened loop.
"""

from __future__ import annotations

from moefx.codegen import _templates_tma
from moefx.codegen.emit import linear_values, operand_names, render
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, LinearSpec


def emit_tma(spec: LinearSpec, schedule: Schedule) -> str:
    """Return the source of a grouped GEMM + bias + epilogue module, with a permutation where rows are to be sorted."""
    k = spec.in_features
    weights, _ = operand_names(spec)
    gathers = spec.gather and schedule.descriptor_gather
    return render(
        _templates_tma.TMA_LINEAR,
        title=f"{spec.name}: grouped projection, loaded by descriptors.",
        **linear_values(spec, schedule),
        item_bytes=ITEM_BYTES[spec.dtype],
        weight_loads=_weight_loads(weights, spec.out_features, spec.halves),
        descriptor_gather=gathers,
        reads_order=gathers,
        permute_columns=min(1024, 1 << (k - 1).bit_length()) if spec.gather and not gathers else 0,
        flatten=schedule.flatten,
        warp_specialize=schedule.warp_specialize,
        programs=schedule.programs,
    )


def _weight_loads(names: list[str], half_rows: int, halves: int) -> list[str]:
    """Return the load of each accumulator's weight tile: from a tensor of its own, or a half of the only one."""
    if len(names) == halves:
        return [f"{name}_desc.load([weight_row, k0])" for name in names]
    return [f"{name}_desc.load([weight_row{shift}, k0])" for name in names for shift in ("", f" + {half_rows}")]

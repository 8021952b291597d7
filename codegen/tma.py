"""Print a grouped projection that loads whole tiles through tensor descriptors (TMA), one program per processor.

The other variant (`moefx.codegen.emit`) gathers rows by pointers and runs one program per tile.  Here rows are first
permuted into expert order, if they are not yet, so that one instruction copies a tile; on Blackwell descriptors gather
rows themselves.  Warps divide into loading and multiplying ones where Triton manages to (``warp_specialize``): Hopper
needs 4 warps, an outer loop that is not flattened and no branch in it; Blackwell needs a flattened loop.
"""

from __future__ import annotations

from moefx.codegen import _templates, _templates_tma
from moefx.codegen.emit import bases, meaning, operand_names, printed, render
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import ITEM_BYTES, LinearSpec


def emit_tma(spec: LinearSpec, schedule: Schedule) -> str:
    """Return the source of a grouped GEMM + bias + epilogue module, with a permutation where rows are to be sorted."""
    n, k = spec.out_features, spec.in_features
    weights, biases = operand_names(spec)
    return render(
        _templates_tma.TMA_LINEAR,
        title=f"{spec.name}: grouped projection, loaded by descriptors.",
        meaning=meaning(spec),
        facts=f"K = {k}, N = {n}; {schedule.describe()}.",
        helpers=[_templates.HELPERS[name] for name in spec.epilogue.helpers],
        dtype=spec.dtype,
        keep=spec.keep,
        item_bytes=ITEM_BYTES[spec.dtype],
        gather=spec.gather,
        top_k=spec.top_k,
        weight_names=weights,
        bias_names=biases,
        operand_names=[*weights, *biases, *(["order"] if spec.gather else [])],
        weight_loads=_weight_loads(weights, n, spec.halves),
        bias_bases=bases(biases, "bias", n, spec.halves),
        halves=spec.halves,
        n=n,
        k=k,
        weight_rows=spec.weight_rows,
        mask_n=n % schedule.block_n != 0,
        column_tiles=-(-n // schedule.block_n),
        block_m=schedule.block_m,
        block_n=schedule.block_n,
        block_k=schedule.block_k,
        group_m=schedule.group_m,
        descriptor_gather=spec.gather and schedule.descriptor_gather,
        permute_columns=0 if schedule.descriptor_gather or not spec.gather else min(1024, 1 << (k - 1).bit_length()),
        flatten=schedule.flatten,
        warp_specialize=schedule.warp_specialize,
        programs=schedule.programs,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        statements=spec.epilogue.triton(),
        result=printed(spec.epilogue),
    )


def _weight_loads(names: list[str], half_rows: int, halves: int) -> list[str]:
    """Return the load of each accumulator's weight tile: from a tensor of its own, or a half of the only one."""
    if len(names) == halves:
        return [f"{name}_desc.load([weight_row, k0])" for name in names]
    return [f"{name}_desc.load([weight_row{shift}, k0])" for name in names for shift in ("", f" + {half_rows}")]

"""The gradients of an expression over rows: of the rows, and of what joins them.

Shapes: T tokens of all samples, R rows, B samples, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moefx.codegen.kernels import TokenGradSpec, TokenProgram
from moefx.codegen.launcher import launcher
from moefx.codegen.runtime import rows_of

#: Rows of a chunk, whose sum one program forms; fewer where there would be too few programs to fill a device.
_CHUNK_ROWS, _PROGRAMS = 32, 512


def operands_of(program: TokenProgram, given: Sequence[Tensor]) -> list[Tensor]:
    """Return the operands as kernels read them: [R, D], [B, D] or [D], and one float32 number per token."""
    return [
        t.reshape(-1).to(torch.float32) if kind == "token" else t.reshape(-1, program.features).contiguous()
        for kind, t in zip(program.operands, given, strict=True)
    ]


def _samples(program: TokenProgram, operands: Sequence[Tensor]) -> int:
    """Return B, which is 1 where nothing belongs to samples."""
    sizes = [t.shape[0] for kind, t in zip(program.operands, operands, strict=True) if kind == "sample"]
    return sizes[0] if sizes else 1


def row_gradients(
    spec: TokenGradSpec,
    grad: Tensor,
    x: Tensor,
    index: Tensor | None,
    given: Sequence[Tensor],
    added: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the rows and of every operand: one launch, and sums over the chunks of samples."""
    p, operands = spec.program, operands_of(spec.program, given)
    rows = (grad if index is None else index).shape[0]
    drow = x.new_empty((rows, p.features))
    if not rows:
        return drow, [torch.zeros_like(t) for t in given]
    samples = _samples(p, operands)
    chunk = max(1, min(_CHUNK_ROWS, rows // _PROGRAMS))
    chunks = -(-(rows // samples) // chunk)
    found = {i: operands[i - 1].new_empty(operands[i - 1].shape) for i in spec.own}
    partial = x.new_empty((samples, chunks, len(p.reduced), p.features), dtype=torch.float32)
    inputs = [rows_of(grad), rows_of(x), *(t for t in (index, added) if t is not None)]
    outputs = [drow, *found.values(), *([partial] if p.reduced else [])]
    launcher(spec, x.device).launch(*inputs, *operands, *outputs, samples, chunks, chunk)
    for j, i in enumerate(p.reduced):
        summed = partial[:, :, j].sum(1)
        found[i] = summed if p.operands[i - 1] == "sample" else summed.sum(0)
    return drow, [found[i].reshape(t.shape).to(t.dtype) for i, t in enumerate(given, 1)]

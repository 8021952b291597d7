"""Shape, dtype and device checks shared by the kernels and the fake rules of the dialect.

They run inside the operators, not only in the façade, so that an exported program that calls ``torch.ops.moefx``
directly is checked too. They read sizes only, never values, and so cost nothing on a device and trace cleanly.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moefx.errors import InputError, MoefxError

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(**tensors: Tensor | None) -> str:
    """Return ``name dtype[shape] on device`` for each tensor, for the ``found`` part of an error."""
    return ", ".join(
        f"{name} None"
        if tensor is None
        else f"{name} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"
        for name, tensor in tensors.items()
    )


def differ(left: int, right: int) -> bool:
    """Say whether two sizes certainly differ.

    A symbolic size that may yet be equal passes while tracing, without a guard; the kernel checks the number it gets.
    """
    return statically_known_true(left != right)


def refuse(what: str, do: str, **tensors: Tensor | None) -> NoReturn:
    """Raise the :class:`InputError` of an operator, with what it was given."""
    raise InputError(what, found=describe(**tensors), do=do)


def one_device(op: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that live on more than one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        refuse(f"moefx.ops.{op} needs all its tensors on one device", "move them with .to(device)", **tensors)


def no_double_backward(op: str) -> NoReturn:
    """Raise the error of a second derivative, which the dialect does not have."""
    raise MoefxError(
        f"the second derivative of moefx::{op} was asked for",
        found="a backward pass through its gradient (create_graph=True)",
        do="differentiate once, or write the penalty with dense layers",
    )


def grouped_mm_takes(left: Tensor, right: Tensor) -> bool:
    """Say whether ``F.grouped_mm`` multiplies these operands and returns a contiguous result.

    Of the last two strides one must be 1; all others and the start must be multiples of 16 bytes. So must the widths: a
    gather makes the strides of ``left`` its width, and torch pads the rows of a result of another width, which no fake
    rule could foresee.
    """
    return all(tensor.shape[-1] * tensor.element_size() % 16 == 0 and _aligned(tensor) for tensor in (left, right))


def _aligned(tensor: Tensor) -> bool:
    wide = 16 // tensor.element_size()
    strides = tensor.stride()
    unit = tensor.dim() - 1 if strides[-1] == 1 else tensor.dim() - 2
    others = all(stride % wide == 0 for dim, stride in enumerate(strides) if dim != unit)
    return strides[unit] == 1 and others and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0

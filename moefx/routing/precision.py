"""Float32 where routing needs it, whatever dtype the model is cast to.

bf16 logits flip the selection at near ties, and an update below 2⁻⁸ of a bf16 router weight is rounded to nothing:
upcycled diffusion transformers with bf16 routers were reported to freeze. So routers and statistics *compute* in
float32 always, and by default they also *stay* in float32 through ``model.to(torch.bfloat16)``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

_DEVICES = ("cpu", "cuda", "meta", "xpu", "mps")


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor is float64, else float32: the dtype routing computes in."""
    # By size: comparing dtypes would tie a trace to the example's dtype.
    return torch.float64 if any(t.element_size() == 8 for t in tensors) else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off for the device of ``x``; a null context where it is not on.

    Entering `torch.autocast` only when needed keeps it out of traces and allows device types that have none (meta).
    """
    kind = next((name for name in _DEVICES if getattr(x, f"is_{name}")), None) or x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(device_type=kind, enabled=False)


class KeepFloat32(nn.Module):
    """A module whose own float32 parameters and buffers are not cast down by ``.to(bfloat16)``, ``.half()`` and such.

    Submodules are cast as usual. Moves between devices, ``to_empty`` and ``.double()`` act as always. A module of one
    dtype is what FSDP1 flattens: set ``keep_in_fp32`` to False where that is required; computing stays in float32.
    """

    keep_in_fp32: bool = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def kept(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            lowered = out.is_floating_point() and out.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(out.device) if lowered else out

        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(kept if self.keep_in_fp32 else fn, recurse=False)  # type: ignore[no-untyped-call]
        return self

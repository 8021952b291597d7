"""Fresh CPU memory for large results, on huge pages where Linux offers them.

A large block comes from the system as unmapped pages, and the first write faults in each. For the 151 MB of an
8192x4608 float32 result that costs 61 ms with pages of 4 KiB, more than the activation that reads it, and 9 ms with
pages of 2 MiB. Torch gives the same advice for every tensor if ``THP_MEM_ALLOC_ENABLE=1`` is set, which few users know.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from functools import cache

from torch import Tensor

# glibc maps blocks of this size separately whatever its tuning, so the advice touches no other allocation.
_OWN_MAPPING_BYTES = 32 * 2**20


def empty(like: Tensor, *shape: int) -> Tensor:
    """Return ``like.new_empty(shape)``; a large CPU result asks for huge pages."""
    fresh = like.new_empty(shape)
    size_bytes = fresh.numel() * fresh.element_size()
    if size_bytes >= _OWN_MAPPING_BYTES and fresh.device.type == "cpu" and (advise := _advise()):
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, fresh.data_ptr() + size_bytes - start, mmap.MADV_HUGEPAGE)
    return fresh


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    """Return ``madvise`` where huge pages can be asked for. It only advises: a refusal changes nothing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise: Callable[[int, int, int], int] = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]  # type: ignore[attr-defined]
    return advise

"""Kernels in files of their own, ready to run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from moefx.codegen import store
from moefx.codegen.schedule import Schedule
from moefx.codegen.spec import Kernel
from moefx.codegen.targets import target_of


class Launcher:
    """One emitted kernel; calling it launches it."""

    def __init__(self, spec: Kernel, schedule: Schedule) -> None:
        self.spec, self.schedule = spec, schedule
        self.launch: Callable[..., None] = store.load(spec.emit(schedule), spec.name).launch


@functools.lru_cache(maxsize=1024)
def launcher(spec: Kernel, device: torch.device) -> Launcher:
    """Return a kernel whose schedule depends on no load."""
    return Launcher(spec, spec.schedule(target_of(device), 0, 0))


def clear() -> None:
    """Forget the kernels of this process; files stay."""
    launcher.cache_clear()

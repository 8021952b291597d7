"""The devices that kernels are made for, as data.

Numbers are vendor specifications, except the shared-memory limits, which are what Triton's launcher allows a block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from moefx.errors import OptionError, nearest


@dataclass(frozen=True)
class Target:
    """A device family that Triton compiles for."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    processors: int
    shared_limit_bytes: int
    l2_bytes: int
    max_stages: int

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels run in Triton's interpreter instead of on a device."""
        return self.backend == "interpreter"


_KIB, _MIB = 1024, 1024 * 1024
_TARGETS = (
    Target("sm_80", "cuda", 80, 32, 108, 166912, 40 * _MIB, 4),
    Target("sm_90", "cuda", 90, 32, 132, 232448, 50 * _MIB, 4),
    Target("sm_100", "cuda", 100, 32, 148, 232448, 126 * _MIB, 4),
    Target("gfx942", "hip", "gfx942", 64, 304, 64 * _KIB, 4 * _MIB, 2),
    Target("interpreter", "interpreter", "cpu", 1, 1, 1 << 40, 1 << 40, 1),
)
TARGETS: dict[str, Target] = {target.name: target for target in _TARGETS}


def target(name: str) -> Target:
    """Return the target of that name, such as ``"sm_90"``."""
    if name not in TARGETS:
        raise OptionError(f"compile kernels for {name!r}", found="an unknown target", do=nearest(name, TARGETS))
    return TARGETS[name]


@functools.cache
def target_of(device: torch.device) -> Target:
    """Return the target of a device that is present; CPU tensors run in the interpreter."""
    if device.type != "cuda":
        return TARGETS["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return TARGETS["gfx942"]
    # The newest family that is not newer than the device: its tiles fit, and Triton compiles for the device itself.
    capability = properties.major * 10 + properties.minor
    known = [t for t in _TARGETS if t.backend == "cuda" and isinstance(t.arch, int) and t.arch <= capability]
    return known[-1] if known else TARGETS["sm_80"]

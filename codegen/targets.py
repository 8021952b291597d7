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
    #: Most shared memory of one block, and what all blocks on one processor share.
    shared_limit_bytes: int
    shared_per_processor_bytes: int
    l2_bytes: int
    max_stages: int
    #: Dense bfloat16 products and memory traffic at the vendor's peak.
    matrix_tflops: float
    memory_tb_per_s: float
    #: Registers of 32 bits and warps that one processor holds.
    registers: int = 65536
    max_warps: int = 64
    #: Whether descriptors load tiles without the help of the multiplying warps.
    has_tma: bool = False

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels run in Triton's interpreter instead of on a device."""
        return self.backend == "interpreter"


_KIB, _MIB = 1024, 1024 * 1024
_TARGETS = (
    Target("sm_80", "cuda", 80, 32, 108, 166912, 164 * _KIB, 40 * _MIB, 4, 312.0, 2.0),
    Target("sm_90", "cuda", 90, 32, 132, 232448, 228 * _KIB, 50 * _MIB, 4, 989.0, 4.8, has_tma=True),
    Target("sm_100", "cuda", 100, 32, 148, 232448, 228 * _KIB, 126 * _MIB, 4, 2250.0, 8.0, has_tma=True),
    Target("gfx942", "hip", "gfx942", 64, 304, 64 * _KIB, 64 * _KIB, 4 * _MIB, 2, 1307.0, 5.3, 131072, 32),
    Target("interpreter", "interpreter", "cpu", 1, 1, 1 << 40, 1 << 40, 1 << 40, 1, 1.0, 1.0),
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

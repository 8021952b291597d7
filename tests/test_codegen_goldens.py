"""The text of the standard kernels, kept as golden files; ``make goldens`` writes them anew."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefx.codegen import CombineSpec, LinearSpec, choose, emit, emit_tile_map, target, trace_pointwise
from moefx.codegen.kernels import ChoiceSumSpec
from moefx.codegen.kernels.grouping import GroupingSpec
from moefx.codegen.kernels.router import RouterGradSpec
from tests.codegen_support import best, down_projection, swiglu, two_weights, up_projection
from tests.router_support import standard_router, within_groups


def sources() -> dict[str, str]:
    """Return the standard kernels, by the name of their golden file."""
    up, down, pair = up_projection(), down_projection(), two_weights()
    sm_80, sm_90, sm_100 = target("sm_80"), target("sm_90"), target("sm_100")
    router = standard_router(8, torch.bfloat16)
    limited = standard_router(60, torch.bfloat16, within_groups(10, 4, 2, 8))
    total = ChoiceSumSpec(1152, "bfloat16")
    grad = RouterGradSpec(router.program, (0,))
    gated = LinearSpec(1000, 300, "float16", False, True, 1, trace_pointwise(swiglu, 600))
    return {
        "kernel_up_gelu_sm_90.py": emit(up, best(up, sm_90, 1024, variant="pointer")),
        "kernel_up_gelu_descriptors_sm_90.py": emit(up, best(up, sm_90, 1024, variant="tma", divided=True)),
        "kernel_up_gelu_descriptors_sm_100.py": emit(up, best(up, sm_100, 1024, variant="tma", divided=True)),
        "kernel_down_descriptors_sm_90.py": emit(down, best(down, sm_90, 1024, variant="tma", divided=True)),
        "kernel_two_weights_sm_80.py": emit(pair, best(pair, sm_80, 1024, variant="pointer")),
        "kernel_gated_ragged_sm_80.py": emit(gated, best(gated, sm_80, 64, variant="pointer")),
        "kernel_down_few_rows_sm_90.py": emit(down, choose(down, sm_90, 4, 2)),
        "kernel_combine.py": emit(CombineSpec(1152, 2, "bfloat16")),
        "kernel_tile_map.py": emit_tile_map(),
        "kernel_grouping.py": emit(GroupingSpec(), GroupingSpec().schedule(sm_90, 1024, 128)),
        "kernel_router_sm_90.py": emit(router, router.schedule(sm_90, 1024, 128)),
        "kernel_router_limited_sm_90.py": emit(limited, limited.schedule(sm_90, 1024, 128)),
        "kernel_choice_combine.py": emit(total, total.schedule(sm_90, 1024, 128)),
        "kernel_router_grad.py": emit(grad, grad.schedule(sm_90, 1024, 128)),
    }


@pytest.mark.parametrize("name", sorted(sources()))
def test_sources_are_stable(name: str, golden: Callable[[str, str], None]) -> None:
    golden(name, sources()[name])


@pytest.mark.skipif(shutil.which("ruff") is None and not Path(sys.executable).with_name("ruff").exists(), reason="ruff")
def test_sources_are_formatted_and_clean(tmp_path: Path) -> None:
    for name, source in sources().items():
        (tmp_path / name).write_text(source)
    for command in (["format", "--check"], ["check", "--select", "E,F,I,UP,B"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--line-length", "120", "--isolated", str(tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_sources_use_no_vendor_library_and_no_atomics() -> None:
    for source in sources().values():
        assert "libdevice" not in source
        assert "atomic" not in source

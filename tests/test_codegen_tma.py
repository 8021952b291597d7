"""The variant that loads through tensor descriptors: numbers in the interpreter, and what each target makes of it."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from moefx.codegen import LinearSpec, Schedule, emit, target, trace_pointwise
from moefx.codegen.schedule import why_no_descriptors


@pytest.mark.parametrize(
    ("spec", "name", "reason"),
    [
        (LinearSpec(1152, 64, "bfloat16"), "sm_90", None),
        (LinearSpec(1152, 64, "bfloat16"), "sm_80", "no tensor memory accelerator"),
        (LinearSpec(1150, 64, "float16"), "sm_90", "multiples of 16 bytes"),
        (LinearSpec(1152, 64, "float32"), "sm_100", "float32"),
    ],
)
def test_descriptors_apply_or_say_why_not(spec: LinearSpec, name: str, reason: str | None) -> None:
    found = why_no_descriptors(spec, target(name))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


def test_only_rows_that_are_gathered_are_permuted() -> None:
    schedule = Schedule(128, 128, 64, 4, 3, 8, variant="tma", programs=132, warp_specialize=True)
    gathered = LinearSpec(64, 64, "bfloat16", gather=True, top_k=2, epilogue=trace_pointwise(F.gelu, 64))
    assert "def permute(" in emit(gathered, schedule)
    assert "def permute(" not in emit(LinearSpec(64, 64, "bfloat16"), schedule)
    assert "divided warps" in emit(gathered, schedule)

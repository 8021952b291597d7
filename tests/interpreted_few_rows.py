"""Projections of few rows per expert: K in parts, operands swapped; run by ``test_codegen_kernels.py``.

Shapes: T tokens, k slots, R = T * k rows, E experts, K input and N output columns.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx import ops
from moefx.codegen import LinearSpec, Schedule, runtime, trace_pointwise
from tests.interpreted_kernels import Region, _poisoned_memory, error  # noqa: F401
from tests.interpreted_tma import CHOICES, check, swiglu

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

WHOLE = Schedule(16, 32, 16, 1, 1, 4)
IN_PARTS = dataclasses.replace(WHOLE, parts=4)
SWAPPED = dataclasses.replace(WHOLE, swapped=True)
BOTH = dataclasses.replace(WHOLE, parts=2, swapped=True)
NAMES = {"parts": IN_PARTS, "swapped": SWAPPED, "both": BOTH}


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("case", sorted(CHOICES))
def test_gathered_rows(name: str, case: str) -> None:
    torch.manual_seed(0)
    spec = LinearSpec(97, 53, "float32", True, True, 2, trace_pointwise(F.gelu, 53))
    check(spec, NAMES[name], F.gelu, CHOICES[case](11, 2, 7), 7)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gated_rows_that_are_kept(name: str, dtype: str) -> None:
    torch.manual_seed(1)
    spec = LinearSpec(71, 29, dtype, True, True, 1, trace_pointwise(swiglu, 58), keep=True)
    check(spec, NAMES[name], swiglu, CHOICES["dropped"](13, 1, 3), 3)


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.sampled_from([1, 2, 5, 17]),
    experts=st.sampled_from([1, 5, 64]),
    width=st.sampled_from([1, 7, 16, 31, 64, 131]),
    hidden=st.sampled_from([1, 3, 32, 37]),
    parts=st.sampled_from([1, 2, 3, 8]),
    swapped=st.booleans(),
    case=st.sampled_from(sorted(CHOICES)),
)
def test_any_shape_and_more_parts_than_steps(
    tokens: int, experts: int, width: int, hidden: int, parts: int, swapped: bool, case: str
) -> None:
    torch.manual_seed(tokens)
    spec = LinearSpec(width, hidden, "float32", bias=True)
    schedule = dataclasses.replace(WHOLE, parts=parts, swapped=swapped)
    check(spec, schedule, lambda z: z, CHOICES[case](tokens, 1, experts), experts)


def test_two_weights_equal_one_of_two_halves() -> None:
    torch.manual_seed(2)
    order, offsets = ops.group(CHOICES["dropped"](9, 2, 5), 5)
    x, weight = torch.randn(9, 40), torch.randn(5, 2 * 24, 40)
    halves = LinearSpec(40, 24, "float32", False, True, 2, trace_pointwise(swiglu, 48))
    pair = trace_pointwise(lambda gate, up: F.silu(gate) * up, 24, inputs=2)
    split = dataclasses.replace(halves, epilogue=pair, weights=2)
    tiles = runtime.tile_map(offsets, order.shape[0], 16)

    def run(spec: LinearSpec, weights: list[Tensor]) -> Tensor:
        out = x.new_empty((order.shape[0], 24))
        return runtime.Projection(spec, IN_PARTS)(x, weights, [], order, tiles, out)

    assert torch.equal(run(halves, [weight]), run(split, list(weight.chunk(2, 1))))


def test_a_region_in_parts_gives_the_same_bits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "schedules", lambda *_: (IN_PARTS, BOTH))
    runtime.clear()
    region = Region(5, 2, 7, 45, 70, "balanced", "float32")
    spec = region.spec(F.gelu)
    found = region.run(spec)
    assert error(found, region.reference(F.gelu)) < 2e-6
    assert torch.equal(found, region.run(spec))
    runtime.clear()

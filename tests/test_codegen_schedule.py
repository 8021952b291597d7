"""Schedules: what a target can hold, what the cost model says, what is shipped; no number of tokens anywhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from moefx.codegen import TARGETS, LinearSpec, Schedule, Target, choose, cost, emit, table, target, trace_pointwise
from moefx.codegen.kernels import InputGradSpec, WeightGradSpec
from moefx.codegen.schedule import configurations, load_class, ranked, row_tile, short_list
from moefx.codegen.spec import ITEM_BYTES
from tests.codegen_support import DEVICES, down_projection, gated_projection, swiglu, up_projection


def fits(spec: LinearSpec, device: Target, schedule: Schedule) -> bool:
    stage = (schedule.block_m + schedule.block_n * spec.halves) * schedule.block_k * ITEM_BYTES[spec.dtype]
    sizes = (schedule.block_m, schedule.block_n, schedule.block_k, schedule.num_warps)
    return all(v & (v - 1) == 0 for v in sizes) and stage * schedule.num_stages <= device.shared_limit_bytes


@pytest.mark.parametrize("name", sorted(TARGETS))
@pytest.mark.parametrize("load", [1, 16, 32, 64, 300, 5000])
def test_schedules_fit_their_target_and_can_be_printed(name: str, load: int) -> None:
    device = target(name)
    for n, k in ((4608, 1152), (1152, 4608), (7, 13), (1, 1), (300, 24), (24576, 3072)):
        for epilogue in (trace_pointwise(F.gelu, 8), trace_pointwise(swiglu, 8)):
            for dtype in ("bfloat16", "float32"):
                spec = LinearSpec(k, n, dtype, epilogue=epilogue)
                chosen = choose(spec, device, load, 8)
                assert chosen == choose(spec, device, load, 8)
                assert fits(spec, device, chosen)
                emit(spec, chosen)


@given(
    load=st.integers(1, 8192), experts=st.integers(1, 64), n=st.integers(1, 6000), k=st.integers(1, 6000),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]), name=st.sampled_from(DEVICES),
)  # fmt: skip
def test_every_configuration_fits(load: int, experts: int, n: int, k: int, dtype: str, name: str) -> None:
    spec, device = LinearSpec(k, n, dtype, gather=True), target(name)
    found = list(configurations(spec, device, row_tile(load)))
    assert found
    assert all(fits(spec, device, schedule) for schedule in found)
    assert all(s.variant == "pointer" for s in found) or (device.has_tma and k * ITEM_BYTES[dtype] % 16 == 0)
    best = ranked(spec, device, load, experts)
    assert sorted(best) == sorted(found)


def test_a_load_class_depends_on_rows_per_expert_alone() -> None:
    assert load_class(8192, 8) == load_class(16384, 16) == 1024
    assert load_class(8193, 8) == load_class(16000, 8) == 2048
    assert {load_class(rows, 8) for rows in range(4097, 8193)} == {1024}
    assert [load_class(rows, 8) for rows in (0, 8, 9, 32, 33, 128, 129)] == [1, 1, 4, 4, 16, 16, 32]
    assert load_class(10**9, 1) == 4096


def test_short_list_has_the_best_of_each_kind() -> None:
    found = short_list(up_projection(), target("sm_90"), 1024, 8)
    assert found[0] == choose(up_projection(), target("sm_90"), 1024, 8)
    assert {s.form for s in found} == {"pointer", "tma divided", "tma"}
    assert len(found) <= 5
    assert {s.variant for s in short_list(up_projection(), target("sm_80"), 1024, 8)} == {"pointer"}


# ---------------------------------------------------------------------------------------------------------- cost model


@pytest.mark.parametrize(("load", "block_m"), list(itertools.product((16, 64, 128, 256, 1024), (16, 64, 128))))
def test_token_padding_is_that_of_random_loads(load: int, block_m: int) -> None:
    schedule = Schedule(block_m, 128, 64)
    found = cost.estimate(down_projection(), schedule, target("sm_90"), load, 8).row_share
    counts = torch.distributions.Multinomial(load * 8, torch.ones(8)).sample((400,))
    simulated = float(counts.sum() / ((counts / block_m).ceil() * block_m).sum())
    assert math.isclose(found, simulated, rel_tol=0.12)


def test_work_and_traffic_equal_the_sums_by_hand() -> None:
    spec, load, experts = gated_projection(), 1024, 8
    found = cost.estimate(spec, Schedule(128, 128, 64), target("sm_90"), load, experts)
    rows = load * experts
    assert found.flops == 2 * rows * 1152 * 9216
    assert found.bytes == 2 * (experts * 9216 * 1152 + rows * 1152 + rows * 4608)
    assert found.column_share == 1.0
    assert found.tiles == math.ceil(8 * (1024 / 128 + 0.45)) * 36
    assert found.seconds >= found.floor_s


def test_columns_past_the_last_tile_are_padding() -> None:
    found = cost.estimate(down_projection(), Schedule(128, 256, 64), target("sm_90"), 1024, 8)
    assert found.column_share == 4.5 / 5


def test_few_rows_are_bound_by_the_weights() -> None:
    spec, device = up_projection(), target("sm_90")
    few = cost.estimate(spec, ranked(spec, device, 16, 8)[0], device, 16, 8)
    many = cost.estimate(spec, ranked(spec, device, 4096, 8)[0], device, 4096, 8)
    assert few.is_memory_bound
    assert not many.is_memory_bound


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("load", [1, 4, 16])
@pytest.mark.parametrize("experts", [2, 8, 64])
@pytest.mark.parametrize("make", [up_projection, down_projection, gated_projection])
def test_few_rows_keep_the_memory_busy(name: str, load: int, experts: int, make: Callable[[], LinearSpec]) -> None:
    """What is asked for ahead covers the latency at full bandwidth, and every processor asks (Little's law)."""
    device, spec = target(name), make()
    chosen = choose(spec, device, load, experts)
    found = cost.estimate(spec, chosen, device, load, experts)
    assert chosen.block_m == 16
    assert chosen.streams
    assert found.tiles >= 0.7 * device.processors
    assert found.flight_bytes >= device.memory_tb_per_s * 1e12 * cost.LATENCY_S
    assert found.seconds < 1.4 * found.floor_s + 3 * cost.FILL_S


def test_k_is_cut_into_parts_where_tiles_are_few() -> None:
    device, spec = target("sm_90"), down_projection()
    assert choose(spec, device, 4, 2).parts > 1
    assert choose(spec, device, 16, 64).parts == 1, "64 experts are tiles enough, and sums of parts are traffic"
    assert choose(spec, device, 256, 2).parts == 1
    whole, halves = (cost.estimate(spec, Schedule(16, 128, 64, 4, 4, parts=p), device, 4, 2) for p in (1, 2))
    assert halves.tiles == 2 * whole.tiles
    assert whole.reduce_s == 0 < halves.reduce_s
    assert halves.seconds < whole.seconds


def test_experts_without_rows_are_not_read() -> None:
    schedule = Schedule(16, 128, 64, 4, 4)
    few, many = (cost.estimate(down_projection(), schedule, target("sm_90"), load, 64) for load in (1, 16))
    counts = torch.distributions.Multinomial(64, torch.ones(64)).sample((400,))
    assert math.isclose(few.bytes / many.bytes, float((counts > 0).float().mean()), rel_tol=0.05)


def test_forms_of_few_rows_are_all_timed() -> None:
    found = short_list(down_projection(), target("sm_90"), 4, 8)
    assert {(s.form, s.parts > 1) for s in found} == {
        ("pointer", False), ("pointer", True), ("swapped", False), ("swapped", True),
    }  # fmt: skip
    assert {s.form for s in short_list(down_projection(), target("sm_80"), 4, 8)} == {"pointer"}


def test_a_permutation_is_paid_for() -> None:
    spec = up_projection()
    by_pointer = Schedule(128, 128, 64)
    by_descriptor = Schedule(128, 128, 64, variant="tma", programs=132)
    gathering = Schedule(128, 128, 64, variant="tma", programs=148, descriptor_gather=True)
    seconds = [
        cost.estimate(spec, s, target("sm_90"), 1024, 8).permute_s for s in (by_pointer, by_descriptor, gathering)
    ]
    assert seconds[0] == seconds[2] == 0.0
    assert seconds[1] > 2 * 2 * 8192 * 1152 / 4.8e12


def test_occupancy_counts_registers_shared_memory_and_warps() -> None:
    sm_90 = target("sm_90")
    assert cost.occupancy(sm_90, 128, 1024, 4) == 4
    assert cost.occupancy(sm_90, 32, 100 * 1024, 4) == 2
    assert cost.occupancy(sm_90, 16, 1024, 16) == 4
    assert cost.occupancy(sm_90, 255, 300 * 1024, 16) == 1


def test_expressions_are_what_is_evaluated() -> None:
    waves = cost.expressions()["waves"]
    numbers = [1024, 8, 4608, 1152, 128, 128, 64, 1, 3, 1, 2, 132, 1, 1, 1, 1, 0, 0, 0]
    sizes = dict(zip(cost._NAMES.split(), numbers, strict=True))
    value = waves.subs({sympy.Symbol(name, positive=True): number for name, number in sizes.items()})
    found = cost.estimate(up_projection(), Schedule(128, 128, 64), target("sm_90"), 1024, 8)
    assert math.isclose(float(value), found.waves)
    assert "ceiling" in cost.explain()


# --------------------------------------------------------------------------------------------------------------- table


def test_shipped_schedules_are_configurations_of_their_shape() -> None:
    entries = table._entries()
    assert len(entries) > 100
    specs = table.standard_specs()
    known = {
        table.key(spec, target(name), load, table.EXPERTS, row_tile(load)): (spec, target(name), load)
        for spec in specs for name in table.TARGET_NAMES for load in table.LOADS
    }  # fmt: skip
    assert set(entries) <= set(known), "an entry that no spec can ask for"
    for name, fields in entries.items():
        spec, device, load = known[name]
        assert Schedule(**fields) in set(configurations(spec, device, row_tile(load)))
        assert choose(spec, device, load, table.EXPERTS) == Schedule(**fields)


def test_numbers_of_experts_count_by_powers_of_two() -> None:
    spec, sm_90 = up_projection(), target("sm_90")
    assert table.key(spec, sm_90, 64, 5, 64) == table.key(spec, sm_90, 64, 8, 64)
    assert table.key(spec, sm_90, 64, 9, 64) != table.key(spec, sm_90, 64, 8, 64)


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("load", [16, 64, 256, 1024, 4096])
def test_tiles_of_gradients_are_ranked_by_the_model(name: str, load: int) -> None:
    device, block_m = target(name), row_tile(load)
    spec = InputGradSpec(1152, 4608, "bfloat16")
    like = LinearSpec(4608, 1152, "bfloat16")
    found = spec.candidates(device, load, block_m)
    prices = [cost.estimate(like, one, device, load, 8).seconds for one in found]
    assert prices == sorted(prices)
    assert len({one.block_n for one in found}) == 3
    assert found[0] == spec.schedule(device, load, block_m)
    assert all(one.block_m == block_m for one in found), "kernels of a region share a tile map"
    if load >= 1024:
        assert found[0].block_n == WeightGradSpec(4608, 1152, "bfloat16").schedule(device, load, block_m).block_n == 128

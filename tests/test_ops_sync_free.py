"""The kernels for devices that must not be waited for, run on CPU tensors.

What this cannot show is their speed, and torch's own grouped kernel on a GPU; that they are right, and that no shape
depends on a value, it can.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moefx.ops import _sync_free
from moefx.ops.combine import _combine_backward, combine_op
from moefx.ops.group import group_op
from moefx.ops.grouped_linear import _bias_grad, _input_grad, _weight_grad, grouped_linear_op

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def both(op: Any, *args: Any) -> list[tuple[Tensor, Tensor]]:
    """Return the results of the kernel for any device and of the CPU kernel."""
    found, expected = op._init_fn(*args), op(*args)
    return [(found, expected)] if isinstance(found, Tensor) else list(zip(found, expected, strict=True))


def close(pairs: list[tuple[Tensor, Tensor]], tolerance: float) -> None:
    for found, expected in pairs:
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1.0)
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * scale)


def routed(tokens: int, slots: int, experts: int, inputs: int, outputs: int, dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + experts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    chosen = torch.randint(-1, experts + 1, (tokens, slots), generator=generator)
    order, offsets = group_op(chosen, experts)
    return {
        "chosen": chosen,
        "order": order,
        "offsets": offsets,
        "x": draw(tokens, inputs),
        "weight": draw(experts, outputs, inputs),
        "bias": draw(experts, outputs),
        "grad": draw(tokens * slots, outputs),
    }


def compare(case: dict[str, Any], slots: int, experts: int, tolerance: float) -> None:
    x, weight, order, offsets, grad = (case[name] for name in ("x", "weight", "order", "offsets", "grad"))
    close(both(group_op, case["chosen"], experts), 0)
    close(both(grouped_linear_op, x, weight, case["bias"], order, offsets, slots), tolerance)
    close(both(grouped_linear_op, x[order // slots], weight, None, None, offsets, 1), tolerance)
    close(both(_input_grad, grad, weight, order, offsets, slots), tolerance)
    close(both(_weight_grad, grad, x, order, offsets, slots), tolerance)
    close(both(_bias_grad, grad, offsets), tolerance)


@given(
    st.sampled_from(list(TOLERANCE)),
    st.tuples(st.integers(0, 40), st.integers(1, 3), st.integers(1, 6), st.integers(1, 19), st.integers(1, 19)),
    st.integers(1, 9),
)
def test_tiles_equal_the_cpu_kernels(dtype: torch.dtype, sizes: tuple[int, int, int, int, int], tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sync_free, "TILE", tile)
        compare(routed(*sizes, dtype), sizes[1], sizes[2], TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [3, 50])
def test_grouped_mm_equals_the_cpu_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sync_free, "_has_grouped_kernel", lambda device: True)
    case = routed(tokens, 2, 5, 16, 24, torch.bfloat16)
    assert _sync_free._grouped_mm_is_legal(case["x"], case["weight"].transpose(1, 2))
    compare(case, 2, 5, TOLERANCE[torch.bfloat16])


def test_grouped_mm_is_used_only_where_it_is_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(2, 16, 24, dtype=torch.bfloat16)
    assert not _sync_free._grouped_mm_is_legal(left, right)  # CPU tensors have a kernel of their own
    monkeypatch.setattr(_sync_free, "_has_grouped_kernel", lambda device: True)
    assert _sync_free._grouped_mm_is_legal(left, right)
    assert not _sync_free._grouped_mm_is_legal(left.float(), right.float())
    assert not _sync_free._grouped_mm_is_legal(left, right[:, :, :23])
    assert not _sync_free._grouped_mm_is_legal(left[:, 1:9], right[:, :8])
    assert not _sync_free._grouped_mm_is_legal(left[:0], right)


@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_kernel_reads_a_value_or_leaves_its_device(device: str, rows_dtype: torch.dtype) -> None:
    """Fake tensors have no values: ``.item()``, ``nonzero`` or a copy to the host would raise; so do mixed devices."""
    with torch.device(device), FakeTensorMode() if device == "cpu" else nullcontext() as mode:
        chosen, gates = torch.zeros(40, 2, dtype=torch.int64), torch.zeros(40, 2)
        x, weight, bias = torch.zeros(40, 16), torch.zeros(5, 24, 16), torch.zeros(5, 24)
    with mode or nullcontext():  # no default device here: a kernel must not lean on it
        order, offsets = group_op._init_fn(chosen, 5)
        rows = grouped_linear_op._init_fn(x, weight, bias, order, offsets, 2)
        assert rows.shape == (80, 24)
        assert _input_grad._init_fn(rows, weight, order, offsets, 2).shape == (40, 16)
        assert _weight_grad._init_fn(rows, x, order, offsets, 2).shape == weight.shape
        assert _bias_grad._init_fn(rows, offsets).shape == bias.shape
        combined = combine_op._init_fn(rows.to(rows_dtype), order, gates)
        rows_grad, gates_grad = _combine_backward._init_fn(combined, rows.to(rows_dtype), order, gates)
        assert (combined.shape, rows_grad.shape, gates_grad.shape) == ((40, 24), (80, 24), (40, 2))
        assert {t.device.type for t in (rows, combined, rows_grad, gates_grad)} == {device}


@pytest.mark.parametrize("groups", [1, 4, 9])
def test_tiles_cover_every_row_within_the_bound(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sync_free, "TILE", 4)
    for rows in range(30):
        cuts = torch.randint(0, rows + 1, (groups,)).sort().values
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), cuts])
        group_of_row = _sync_free.group_of_row(offsets, rows)
        tiles = _sync_free._Tiles.of(group_of_row, offsets)
        inside = group_of_row < groups
        places = tiles.place[inside]
        assert places.unique().numel() == places.numel()
        assert bool((places < tiles.count * 4).all())
        assert torch.equal(tiles.expert[places // 4], group_of_row[inside])
        assert bool((tiles.place[~inside] == tiles.count * 4).all())

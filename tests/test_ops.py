"""The dialect's arithmetic against a plain float64 loop. Shapes: see ``moefx.ops``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.errors import InputError, MoefxError
from moefx.ops import _cpu, combine, group, grouped_linear

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One product and one sum, relative to the largest output (specs: 1e-12, 1e-6, 2e-2, 3e-3).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids(tokens: int, slots: int, experts: int, seed: int = 0) -> Tensor:
    """Return expert ids of which some lie outside ``[0, experts)`` on either side."""
    return torch.randint(-1, experts + 2, (tokens, slots), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1.0))


def loop_grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, experts_TK: Tensor) -> Tensor:
    """Return the rows one by one: no sorting, no grouping, differentiable in float64."""
    flat, slots = experts_TK.reshape(-1).tolist(), experts_TK.shape[1]
    rows = []
    for pair in order.tolist():
        expert = flat[pair]
        if 0 <= expert < weight.shape[0]:
            rows.append(F.linear(x[pair // slots], weight[expert], None if bias is None else bias[expert]))
        else:
            rows.append((x[pair // slots] * 0).sum().expand(weight.shape[1]))
    return torch.stack(rows) if rows else F.linear(x, weight[0], None if bias is None else bias[0])


def loop_combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    out = [torch.zeros(rows.shape[1], dtype=rows.dtype) for _ in range(weights.shape[0])]
    for row, pair in enumerate(order.tolist()):
        token, slot = divmod(pair, weights.shape[1])
        out[token] = out[token] + weights[token, slot] * rows[row]
    return torch.stack(out) if out else rows * weights.sum()


def routed_ffn(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, e: Tensor, g: Tensor) -> Tensor:
    order, offsets = group(e, w1.shape[0])
    hidden = F.gelu(grouped_linear(x, w1, b1, order, offsets, e.shape[1]))
    return combine(grouped_linear(hidden, w2, b2, None, offsets), order, g)


def loop_ffn(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, e: Tensor, g: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=x.dtype)
    for slot in range(e.shape[1]):
        for expert in range(w1.shape[0]):
            hidden = F.gelu(F.linear(x, w1[expert], None if b1 is None else b1[expert]))
            out = F.linear(hidden, w2[expert], None if b2 is None else b2[expert])
            y = y + torch.where((e[:, slot] == expert).unsqueeze(1), g[:, slot : slot + 1] * out, 0.0)
    return y


@given(
    st.integers(0, 40), st.integers(0, 4), st.integers(1, 9), st.sampled_from([torch.int64, torch.int32, torch.int8])
)
@settings(deadline=None, max_examples=60)
def test_group_is_a_stable_sort_with_a_tail(tokens: int, slots: int, experts: int, dtype: torch.dtype) -> None:
    chosen = ids(tokens, slots, experts, seed=tokens).to(dtype)
    order, offsets = group(chosen, experts)
    flat = [e if 0 <= e < experts else experts for e in chosen.reshape(-1).tolist()]
    assert order.tolist() == sorted(range(len(flat)), key=flat.__getitem__)
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]
    assert order.dtype == offsets.dtype == torch.int64


def test_group_takes_more_experts_than_a_radix_key_holds() -> None:
    chosen = torch.tensor([[70_000], [3], [65_536], [65_535], [-5]])
    order, offsets = group(chosen, 70_000)
    assert order.tolist() == [1, 3, 2, 0, 4]
    assert offsets[-1] == 3
    assert offsets[65_536] == 2


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_group_takes_narrow_ids_of_many_experts(dtype: torch.dtype) -> None:
    order, offsets = group(torch.tensor([[3, 1], [100, 1]], dtype=dtype), 300)
    assert order.tolist() == [1, 3, 0, 2]
    assert offsets[[0, 1, 2, 3, 4, 300]].tolist() == [0, 0, 2, 2, 3, 4]


@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 17), st.integers(1, 3), st.integers(1, 6), st.integers(1, 21), st.integers(1, 21)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_grouped_linear_equals_a_loop(
    dtype: torch.dtype, sizes: tuple[int, int, int, int, int], with_bias: bool, fused: bool, seed: int
) -> None:
    tokens, slots, experts, inputs, outputs = sizes
    chosen = ids(tokens, slots, experts, seed)
    order, offsets = group(chosen, experts)
    x, weight = draw(tokens, inputs, dtype=dtype, seed=seed), draw(experts, outputs, inputs, dtype=dtype, seed=seed + 1)
    bias = draw(experts, outputs, dtype=dtype, seed=seed + 2) if with_bias else None
    exact = [t.double().requires_grad_() for t in (x, weight, bias) if t is not None]
    expected = loop_grouped_linear(exact[0], exact[1], exact[2] if with_bias else None, order, chosen)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    found = grouped_linear(x if fused else x[order // slots], weight, bias, order if fused else None, offsets, slots)
    close(found, expected, TOLERANCE[dtype])
    seeds = draw(*found.shape, dtype=dtype, seed=seed + 3)
    grads = torch.autograd.grad(found, leaves, seeds)
    expected_grads = torch.autograd.grad(expected, exact, seeds.double(), materialize_grads=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        close(grad, expected_grad, TOLERANCE[dtype])


@given(
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(0, 17), st.integers(1, 5), st.integers(1, 21)),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=80)
def test_combine_equals_a_loop(
    dtype: torch.dtype, gate_dtype: torch.dtype, sizes: tuple[int, int, int], seed: int
) -> None:
    tokens, slots, width = sizes
    order, _ = group(ids(tokens, slots, 4, seed), 4)
    rows, weights = draw(tokens * slots, width, dtype=dtype, seed=seed), draw(tokens, slots, dtype=gate_dtype, seed=9)
    exact = [rows.double().requires_grad_(), weights.double().requires_grad_()]
    expected = loop_combine(exact[0], order, exact[1])
    leaves = [rows.requires_grad_(), weights.requires_grad_()]
    found = combine(rows, order, weights)
    assert found.dtype == dtype
    close(found, expected, TOLERANCE[dtype])
    seeds = draw(tokens, width, dtype=dtype, seed=seed + 1)
    rows_grad, weights_grad = torch.autograd.grad(found, leaves, seeds)
    rows_expected, weights_expected = torch.autograd.grad(expected, exact, seeds.double())
    assert (rows_grad.dtype, weights_grad.dtype) == (dtype, gate_dtype)
    close(rows_grad, rows_expected, TOLERANCE[dtype])
    close(weights_grad, weights_expected, max(TOLERANCE[dtype], TOLERANCE[gate_dtype]))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck(with_bias: bool) -> None:
    chosen = ids(7, 2, 4, seed=3)
    x, w1, w2, gates = draw(7, 3), draw(4, 5, 3, seed=1), draw(4, 2, 5, seed=2), draw(7, 2, seed=3)
    biases = (draw(4, 5, seed=4), draw(4, 2, seed=5)) if with_bias else (None, None)
    leaves = [t.requires_grad_() for t in (x, w1, biases[0], w2, biases[1], gates) if t is not None]

    def function(*_: Tensor) -> Tensor:
        return routed_ffn(x, w1, biases[0], w2, biases[1], chosen, gates)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_widths_with_every_token_on_one_expert(dtype: torch.dtype) -> None:
    chosen = torch.full((33, 1), 2)
    x, w1, w2 = draw(33, 1025, dtype=dtype), draw(4, 37, 1025, dtype=dtype) / 32, draw(4, 1025, 37, dtype=dtype) / 6
    gates = torch.rand(33, 1, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    found = routed_ffn(x, w1, None, w2, None, chosen, gates)
    expected = loop_ffn(exact[0], exact[1], None, exact[2], None, chosen, gates.double())
    close(found, expected, TOLERANCE[dtype])
    grads = torch.autograd.grad(found.sum(), leaves)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        close(grad, expected_grad, TOLERANCE[dtype])
    for expert in (0, 1, 3):
        assert not grads[1][expert].any()
        assert not grads[2][expert].any()


def test_bias_of_an_empty_expert_gets_zeros_and_the_tail_gets_no_bias() -> None:
    order, offsets = group(torch.tensor([[0, 7], [2, -1]]), 3)
    bias = torch.ones(3, 4, requires_grad=True)
    rows = grouped_linear(torch.zeros(2, 5), torch.zeros(3, 4, 5), bias, order, offsets, 2)
    assert rows.tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]
    rows.sum().backward()
    assert bias.grad is not None
    assert bias.grad[:, 0].tolist() == [1.0, 0.0, 1.0]


def test_non_finite_rows_of_the_tail_reach_neither_output_nor_gradient() -> None:
    _, offsets = group(torch.tensor([[0], [5], [1]]), 2)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [float("nan"), float("inf")]], requires_grad=True)
    weight = torch.ones(2, 3, 2, requires_grad=True)
    bias = torch.zeros(2, 3, requires_grad=True)
    rows = grouped_linear(x, weight, bias, None, offsets)
    assert rows.sum(1).tolist() == [9.0, 21.0, 0.0]
    seeds = torch.ones(3, 3)
    seeds[2] = float("nan")
    grads = torch.autograd.grad(rows, (x, weight, bias), seeds)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert grads[0][2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_weights_inputs_and_gradients(dtype: torch.dtype) -> None:
    chosen = ids(19, 2, 3)
    order, offsets = group(chosen, 3)
    x = draw(38, 22, dtype=dtype)[::2, 1::2]
    weight = draw(11, 3, 14, dtype=dtype).permute(1, 2, 0)[:, 1::2]
    bias = draw(7, 3, dtype=dtype).t()
    found = grouped_linear(x, weight, bias, order, offsets, 2)
    exact = loop_grouped_linear(x.double(), weight.double(), bias.double(), order, chosen)
    close(found, exact, TOLERANCE[dtype])
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    plain = [t.detach().contiguous().requires_grad_() for t in leaves]
    for one, other in zip(
        torch.autograd.grad(grouped_linear(*leaves, order, offsets, 2).sum(), leaves),  # an expanded gradient
        torch.autograd.grad(grouped_linear(*plain, order, offsets, 2), plain, torch.ones_like(found)),
        strict=True,
    ):
        close(one, other.double(), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_file_map_left_unaligned(dtype: torch.dtype) -> None:
    weight = draw(3, 8, 16, dtype=dtype)
    shifted = bytearray(weight.element_size()) + bytearray(weight.view(torch.uint8).numpy().tobytes())
    unaligned = torch.frombuffer(shifted, dtype=dtype, offset=weight.element_size()).view(3, 8, 16)
    assert unaligned.data_ptr() % 16
    order, offsets = group(ids(9, 1, 3), 3)
    x = draw(9, 16, dtype=dtype)
    close(
        grouped_linear(x, unaligned, None, order, offsets),
        grouped_linear(x, weight, None, order, offsets),
        TOLERANCE[dtype],
    )


def test_float32_gates_are_not_rounded_for_half_precision_rows() -> None:
    gates = torch.full((64, 3), 1 / 3)
    rows = torch.ones(192, 8, dtype=torch.bfloat16)
    assert torch.equal(combine(rows, torch.arange(192), gates), torch.ones(64, 8, dtype=torch.bfloat16))


def test_combine_and_its_gradient_span_several_cache_chunks() -> None:
    order, _ = group(ids(1200, 2, 4), 4)
    rows, gates = draw(2400, 5, dtype=torch.bfloat16).requires_grad_(), draw(1200, 2, dtype=torch.float32)
    gates.requires_grad_()
    exact_rows, exact_gates = rows.detach().double().requires_grad_(), gates.detach().double().requires_grad_()
    found, expected = combine(rows, order, gates), loop_combine(exact_rows, order, exact_gates)
    close(found, expected, 2e-2)
    for one, other in zip(
        torch.autograd.grad(found.sum(), (rows, gates)),
        torch.autograd.grad(expected.sum(), (exact_rows, exact_gates)),
        strict=True,
    ):
        close(one, other, 2e-2)


def test_a_rerun_gives_the_same_bits() -> None:
    chosen = ids(300, 4, 5)
    x, w1, w2, gates = draw(300, 33), draw(5, 40, 33, seed=1), draw(5, 33, 40, seed=2), draw(300, 4, seed=3)
    leaves = [t.float().requires_grad_() for t in (x, w1, w2, gates)]

    def once() -> list[Tensor]:
        y = routed_ffn(leaves[0], leaves[1], None, leaves[2], None, chosen, leaves[3])
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(one, other) for one, other in zip(once(), once(), strict=True))


def test_only_wanted_gradients_are_made() -> None:
    order, offsets = group(ids(5, 1, 2), 2)
    x, weight = draw(5, 3), draw(2, 4, 3)
    rows = grouped_linear(x.requires_grad_(), weight, None, order, offsets)
    assert [t is None for t in rows.grad_fn.saved_tensors] == [True, False, False, False]
    frozen_gates = combine(rows, order, draw(5, 1))
    assert frozen_gates.grad_fn.saved_tensors[0] is None
    frozen_gates.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("leaf", ["x", "gates"])
def test_second_derivatives_are_refused(leaf: str) -> None:
    x, gates = draw(6, 3).requires_grad_(), draw(6, 2).requires_grad_()
    y = routed_ffn(x, draw(2, 4, 3), None, draw(2, 3, 4), None, ids(6, 2, 2), gates)
    wanted = x if leaf == "x" else gates
    (grad,) = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    with pytest.raises(MoefxError, match="second derivative of moefx::"):
        grad.sum().backward()


X, W, B = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.zeros(2, 5)
ORDER, OFFSETS = torch.arange(8), torch.tensor([0, 4, 8])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: group(torch.zeros(4, dtype=torch.int64), 2), r"ids \[T, K\]"),
        (lambda: group(torch.zeros(4, 1), 2), r"integer dtype\n  found: experts float32\[4, 1\]"),
        (lambda: group(torch.zeros(4, 1, dtype=torch.int64), 0), "0 experts"),
        (lambda: grouped_linear(X[None], W, None, ORDER, OFFSETS, 2), r"needs x \[T, I\]"),
        (lambda: grouped_linear(X[:, :2], W, None, ORDER, OFFSETS, 2), r"one weight \[N, I\]"),
        (lambda: grouped_linear(X, W, None, ORDER, OFFSETS[:2], 2), "offsets"),
        (lambda: grouped_linear(X, W, B[:, :4], ORDER, OFFSETS, 2), r"bias \[E, N\]"),
        (lambda: grouped_linear(X, W, B[0], ORDER, OFFSETS, 2), r"bias \[E, N\]"),
        (lambda: grouped_linear(X, W, B, ORDER, OFFSETS, 1), "k = 1"),
        (lambda: grouped_linear(X, W, B, ORDER, OFFSETS, 0), "k = 0"),
        (lambda: grouped_linear(X.half(), W, B, ORDER, OFFSETS, 2), "one floating dtype"),
        (lambda: grouped_linear(X, W, B.double(), ORDER, OFFSETS, 2), "one floating dtype"),
        (lambda: grouped_linear(X, W, B, ORDER.int(), OFFSETS, 2), "int64"),
        (lambda: grouped_linear(X, W, B, ORDER, OFFSETS.to("meta"), 2), "one device"),
        (lambda: combine(X, ORDER, torch.zeros(4, 2)), "one row for each"),
        (lambda: combine(X[0], ORDER, torch.zeros(4, 2)), r"rows \[T\*K, D\]"),
        (lambda: combine(torch.zeros(8, 3), ORDER, torch.zeros(4, 2).long()), "floating"),
        (lambda: combine(torch.zeros(8, 3), ORDER.int(), torch.zeros(4, 2)), "int64 order"),
    ],
)
def test_bad_arguments_are_refused_with_what_was_found(call: object, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        call()  # type: ignore[operator]
    assert "found:" in str(caught.value)
    assert "do:" in str(caught.value)


@pytest.mark.parametrize("native", [True, False], ids=["native", "through float32"])
@pytest.mark.parametrize("small", [0, 2**20], ids=["loop", "one call"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_of_the_cpu_product(
    dtype: torch.dtype, small: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu, "SMALL_ELEMENTS", small)
    monkeypatch.setattr(_cpu, "_native", lambda _: native)
    chosen = ids(50, 2, 4)
    order, offsets = group(chosen, 4)
    leaves = [draw(50, 16, dtype=dtype), draw(4, 24, 16, dtype=dtype, seed=1)]
    exact = [t.double().requires_grad_() for t in leaves]
    found = grouped_linear(*(t.requires_grad_() for t in leaves), None, order, offsets, 2)
    expected = loop_grouped_linear(exact[0], exact[1], None, order, chosen)
    close(found, expected, TOLERANCE[dtype])
    seeds = draw(100, 24, dtype=dtype, seed=2)
    for grad, expected_grad in zip(
        torch.autograd.grad(found, leaves, seeds),
        torch.autograd.grad(expected, exact, seeds.double()),
        strict=True,
    ):
        close(grad, expected_grad, TOLERANCE[dtype])


def test_the_one_call_is_taken_for_small_aligned_products_only() -> None:
    left, right = torch.zeros(8, 16), torch.zeros(2, 16, 24)
    assert _cpu._is_small(8 * 24, left, right)
    assert not _cpu._is_small(2**21, left, right)
    assert not _cpu._is_small(8 * 24, left.double(), right.double())
    assert not _cpu._is_small(8 * 24, left[:, 1:9], right[:, :8])
    assert not _cpu._is_small(8 * 23, left, right[:, :, :23])


@pytest.mark.parametrize("outputs", [23, 24])
@pytest.mark.parametrize("inputs", [15, 16])
def test_results_are_contiguous_as_the_fake_rules_say(inputs: int, outputs: int) -> None:
    order, offsets = group(ids(8, 1, 2), 2)
    x, weight = draw(8, 16, dtype=torch.float32)[:, :inputs], draw(2, outputs, 16, dtype=torch.float32)[:, :, :inputs]
    rows = grouped_linear(x.requires_grad_(), weight.requires_grad_(), None, order, offsets)
    grads = torch.autograd.grad(rows, (x, weight), torch.ones_like(rows))
    assert all(t.is_contiguous() for t in (rows, *grads))

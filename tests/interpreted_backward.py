"""Gradients by emitted kernels against float64 autograd, in Triton's interpreter; run by ``test_codegen_kernels.py``.

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
from moefx.codegen import CombineSpec, LinearSpec, RegionSpec, backward, runtime, trace_pointwise
from tests.interpreted_kernels import Function, Region, _poisoned_memory, error, experts_of, swiglu  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

TOLERANCE = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 3e-2}  # bfloat16 stores truncate in the interpreter


def operands(region: Region) -> list[Tensor]:
    return [
        region.x,
        region.offsets,
        region.order,
        region.w_in,
        region.b_in,
        region.w_out,
        region.b_out,
        region.gates,
    ]


def gradients(tensors: list[Tensor], spec: RegionSpec, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the result and the gradients of all floating inputs by the emitted kernels."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
    out, *_ = torch.ops.moefx.region_train(leaves, runtime.register(spec))
    return out.detach(), list(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad))


def reference(region: Region, act: Function, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the same in float64, by a loop over rows."""
    tensors = [t.double() if t.is_floating_point() else t for t in operands(region)]
    leaves = [t.requires_grad_() for t in tensors if t.is_floating_point()]
    x, w_in, b_in, w_out, b_out, gates = leaves
    rows = [torch.zeros(region.width, dtype=torch.float64)] * 0
    tokens: list[int] = []
    bounds = region.offsets.tolist()
    for expert in range(region.experts):
        for flat in region.order[bounds[expert] : bounds[expert + 1]].tolist():
            token, slot = divmod(flat, region.slots)
            h = act((w_in[expert] @ x[token] + b_in[expert])[None])[0]
            rows.append(gates[token, slot] * (w_out[expert] @ h + b_out[expert]))
            tokens.append(token)
    out = torch.zeros(x.shape[0], region.width, dtype=torch.float64)
    if rows:
        out = out.index_add(0, torch.tensor(tokens), torch.stack(rows))
        return out.detach(), list(torch.autograd.grad(out, leaves, grad.double()))
    return out, [torch.zeros_like(leaf) for leaf in leaves]


def check(region: Region, act: Function, tolerance: float | None = None) -> None:
    spec = region.spec(act)
    grad = torch.randn(region.x.shape[0], region.width).to(region.x.dtype)
    out, got = gradients(operands(region), spec, grad)
    want_out, want = reference(region, act, grad)
    limit = tolerance or TOLERANCE[region.dtype]
    assert error(out, want_out) < limit
    for one, other, leaf in zip(got, want, ["x", "w_in", "b_in", "w_out", "b_out", "gates"], strict=True):
        if float(other.norm()) == 0.0:
            assert not one.any(), leaf
        else:
            assert error(one, other) < limit, (leaf, error(one, other))


@pytest.mark.parametrize(
    ("tokens", "slots", "experts", "width", "hidden", "case"),
    [
        (37, 2, 5, 45, 70, "balanced"),
        (24, 1, 4, 32, 64, "empty experts"),
        (41, 3, 7, 33, 100, "dropped"),
        (1, 1, 1, 17, 13, "balanced"),
        (50, 2, 8, 64, 128, "one takes all"),
        (5, 4, 4, 16, 48, "balanced"),
        (40, 2, 64, 24, 16, "balanced"),
        (9, 2, 3, 24, 20, "all dropped"),
        (0, 2, 3, 24, 20, "all dropped"),
    ],
)
def test_gradients_equal_float64(tokens: int, slots: int, experts: int, width: int, hidden: int, case: str) -> None:
    check(Region(tokens, slots, experts, width, hidden, case, "float32"), F.gelu)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    check(Region(29, 2, 3, 40, 56, "dropped", dtype), F.silu)


def test_gated() -> None:
    check(Region(19, 2, 3, 24, 2 * 35, "dropped", "float32"), swiglu)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    tokens=st.sampled_from([1, 2, 7, 31]),
    slots=st.integers(1, 3),
    experts=st.sampled_from([3, 5, 11]),
    width=st.sampled_from([1, 3, 17, 64, 71]),
    hidden=st.sampled_from([2, 5, 37, 64]),
    case=st.sampled_from(["balanced", "empty experts", "dropped", "one takes all"]),
)
def test_any_shape(tokens: int, slots: int, experts: int, width: int, hidden: int, case: str) -> None:
    check(Region(tokens, slots, experts, width, hidden, case, "float32"), F.silu, 2e-5)


def test_two_weights_equal_one_of_two_halves() -> None:
    region = Region(19, 2, 3, 24, 2 * 35, "dropped", "float32")
    spec = region.spec(swiglu)
    pair = trace_pointwise(lambda gate, up: F.silu(gate) * up, 35, inputs=2)
    split = RegionSpec((dataclasses.replace(spec.linears[0], epilogue=pair, weights=2), spec.linears[1]), spec.combine)
    w, b = (list(t.chunk(2, 1)) for t in (region.w_in, region.b_in))
    two = [region.x, region.offsets, region.order, *w, *b, region.w_out, region.b_out, region.gates]
    grad = torch.randn(19, 24)
    _, one_weight = gradients(operands(region), spec, grad)
    _, two_weights = gradients(two, split, grad)
    x, w0, w1, b0, b1, *rest = two_weights
    joined = [x, torch.cat([w0, w1], 1), torch.cat([b0, b1], 1), *rest]
    torch.testing.assert_close(joined, one_weight, atol=1e-6, rtol=1e-5)


def test_repeated_runs_are_bitwise_equal() -> None:
    region = Region(37, 3, 5, 45, 70, "dropped", "float32")
    spec, grad = region.spec(F.gelu), torch.randn(37, 45)
    first, second = (gradients(operands(region), spec, grad)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("act", [F.gelu, torch.nn.Identity()])
@pytest.mark.parametrize("combined", [True, False])
def test_a_single_projection(act: Function, combined: bool) -> None:
    """An expression before the combine, or at the end of a region, starts the backward pass without a product."""
    torch.manual_seed(0)
    x, w, b = torch.randn(23, 20), torch.randn(4, 33, 20), torch.randn(4, 33)
    order, offsets = ops.group(experts_of("dropped", 23, 2, 4), 4)
    gates = torch.rand(23, 2)
    linear = LinearSpec(20, 33, "float32", True, True, 2, trace_pointwise(act, 33))
    spec = RegionSpec((linear,), CombineSpec(33, 2, "float32") if combined else None)
    grad = torch.randn(23 if combined else 46, 33)
    out, got = gradients([x, offsets, order, w, b, *([gates] if combined else [])], spec, grad)
    leaves = [t.double().requires_grad_() for t in (x, w, b, gates)]
    rows = act(ops.grouped_linear(*leaves[:3], order, offsets, 2))
    want = ops.combine(rows, order, leaves[3]) if combined else rows
    assert error(out, want.detach()) < 2e-6
    wanted = torch.autograd.grad(want, leaves if combined else leaves[:3], grad.double())
    for one, other in zip(got, wanted, strict=True):
        assert error(one, other) < 5e-6


def test_a_chain_of_three_projections_with_a_plain_one_inside() -> None:
    torch.manual_seed(0)
    x = torch.randn(21, 12)
    order, offsets = ops.group(experts_of("balanced", 21, 2, 3), 3)
    gates = torch.rand(21, 2)
    weights = [torch.randn(3, 18, 12), torch.randn(3, 30, 18), torch.randn(3, 12, 30)]
    gelu = trace_pointwise(F.gelu, 30)
    linears = (
        LinearSpec(12, 18, "float32", False, True, 2),
        LinearSpec(18, 30, "float32", epilogue=gelu),
        LinearSpec(30, 12, "float32"),
    )
    grad = torch.randn(21, 12)
    tensors = [x, offsets, order, *weights, gates]
    _, got = gradients(tensors, RegionSpec(linears, CombineSpec(12, 2, "float32")), grad)
    leaves = [t.double().requires_grad_() for t in (x, *weights, gates)]
    rows = ops.grouped_linear(leaves[0], leaves[1], None, order, offsets, 2)
    rows = F.gelu(ops.grouped_linear(rows, leaves[2], None, None, offsets, 1))
    rows = ops.grouped_linear(rows, leaves[3], None, None, offsets, 1)
    want = torch.autograd.grad(ops.combine(rows, order, leaves[4]), leaves, grad.double())
    for one, other in zip(got, want, strict=True):
        assert error(one, other) < 5e-6


def test_only_wanted_gradients_are_made() -> None:
    region = Region(13, 2, 3, 24, 20, "balanced", "float32")
    key = runtime.register(region.spec(F.gelu))
    tensors = operands(region)
    tensors[0] = tensors[0].clone().requires_grad_()
    out, *saved = torch.ops.moefx.region_train(tensors, key)
    (grad,) = torch.autograd.grad(out, [tensors[0]], torch.ones_like(out).expand(13, 24))
    wants = [i == 0 for i in range(len(tensors))]
    found = torch.ops.moefx.region_backward(torch.ones(13, 24), [t.detach() for t in tensors], saved, key, wants)
    assert len(found) == 1
    assert torch.equal(found[0], grad)


def test_operators_keep_the_rules_of_custom_operators() -> None:
    region = Region(7, 2, 3, 8, 12, "balanced", "float32")
    key = runtime.register(region.spec(F.silu))
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in operands(region)]
    torch.library.opcheck(torch.ops.moefx.region_train, (tensors, key), test_utils=["test_schema", "test_faketensor"])
    torch.library.opcheck(torch.ops.moefx.region_train, (tensors, key), test_utils="test_autograd_registration")


def test_every_kernel_of_the_backward_pass_is_listed() -> None:
    region = Region(7, 2, 3, 8, 12, "balanced", "float32")
    names = [spec.name.split("_")[0] for spec in backward.kernels(region.spec(F.silu))]
    assert names == ["combined", "weight", "input", "weight", "gate", "sum"]

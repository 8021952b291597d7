"""Backward kernels in Triton's interpreter, derivatives of expressions, and what compilers make of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.codegen import CombineSpec, RegionSpec, backward, target, trace_pointwise
from moefx.codegen.aot import MATRIX_INSTRUCTIONS, Compiled, Job, compile_all
from moefx.codegen.derivative import differentiate
from moefx.codegen.pointwise import OPS, Builder
from moefx.codegen.spec import Kernel
from tests.codegen_support import down_projection, gated_projection, needs_triton, two_weights, up_projection

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.gelu,
    lambda z: F.gelu(z, approximate="tanh"),
    F.silu,
    F.relu,
    F.relu6,
    F.hardtanh,
    lambda z: F.relu(z) ** 2,
    F.mish,
    F.softplus,
    F.logsigmoid,
    F.elu,
    F.selu,
    F.leaky_relu,
    F.softsign,
    F.hardshrink,
    F.softshrink,
    torch.tanh,
    torch.abs,
    lambda z: z.clamp(-1, 2),
    lambda z: torch.maximum(z, 2 * z),
    lambda z: torch.minimum(z, z * z),
    lambda z: torch.sqrt(z * z + 1) / (1 + z.abs()) + torch.rsqrt(z * z + 2),
    lambda z: torch.log1p(z * z) + torch.sin(z) * torch.cos(z) + torch.log(z * z + 1) + torch.log2(z * z + 2),
    lambda z: 2.0**z + z.sign() + z.floor() * z.ceil() + torch.erf(z) + torch.expm1(-z * z),
]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivatives_equal_autograd(act: Callable[[Tensor], Tensor]) -> None:
    """Also at kinks and bounds, where zero-initialised weights put every value, and where exp overflows."""
    z = torch.cat([torch.linspace(-4, 4, 33), torch.tensor([-100.0, 90.0, 0.0, -1.0, 2.0, 6.0, 20.0])]).view(5, 8)
    z = z.double().requires_grad_()
    g = torch.randn(5, 8, dtype=torch.float64)
    value, grad = differentiate(trace_pointwise(act, 8)).evaluate(g, z.detach())
    torch.testing.assert_close(value, act(z).detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad, torch.autograd.grad(act(z), z, g)[0], atol=1e-6, rtol=1e-6)


def test_derivative_of_a_gated_expression_has_two_gradients() -> None:
    z, g = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 4, dtype=torch.float64)
    _, *grads = differentiate(trace_pointwise(F.glu, 8)).evaluate(g, *z.detach().chunk(2, -1))
    torch.testing.assert_close(torch.cat(grads, -1), torch.autograd.grad(F.glu(z), z, g)[0])


def test_overflow_on_the_side_not_chosen_does_not_spread() -> None:
    program = differentiate(trace_pointwise(lambda z: torch.where(z > 1, z, torch.exp(z * z * z)), 8))
    z = torch.full((1, 8), 30.0)
    _, grad = program.evaluate(torch.ones(1, 8), z)
    assert grad.tolist() == [[1.0] * 8]


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if not op.is_bool])
def test_every_primitive_has_a_derivative(op: str) -> None:
    """By central differences, at points where every primitive is smooth."""
    arity = {"where": 3}.get(op, OPS[op].triton.count("{"))
    builder = Builder(2)
    args = (builder.step("gt", "z0", 0.0), "z0", "z1") if op == "where" else ("z0", "z1")[:arity]
    args = (builder.step("gt", "z0", 0.0),) if op == "to_float" else args
    program = builder.finish(builder.step(op, *args))
    z = [torch.tensor([0.31, 1.7, 2.4]).double(), torch.tensor([1.1, 0.6, 0.2]).double()]
    _, *grads = differentiate(program).evaluate(torch.ones(3), *z)
    for i, grad in enumerate(grads):
        step = [1e-6 * (i == j) for j in range(2)]
        above, below = (program.evaluate(*(v + s * d for v, d in zip(z, step, strict=True))) for s in (1, -1))
        torch.testing.assert_close(grad, ((above - below) / 2e-6).expand(3), atol=1e-7, rtol=1e-6)


def test_expressions_that_are_not_zero_at_zero_are_known() -> None:
    assert trace_pointwise(F.gelu, 8).keeps_zero
    assert not trace_pointwise(torch.sigmoid, 8).keeps_zero
    assert math.isclose(float(trace_pointwise(torch.sigmoid, 8).evaluate(torch.zeros(1))), 0.5)


REGIONS = {"gelu": up_projection, "gated": gated_projection, "two weights": two_weights}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_backward_kernels_fit_their_target(device: str) -> None:
    chosen = target(device)
    specs: dict[str, Kernel] = {}
    for up in REGIONS.values():
        region = RegionSpec((up(), down_projection()), CombineSpec(1152, 2, "bfloat16"))
        specs |= {spec.name: spec for spec in backward.kernels(region) if isinstance(spec, Kernel)}
    jobs = [
        Job(name, spec.emit(spec.schedule(chosen, 1024, 128)), tuple(spec.arguments(4098, 7, 39)), chosen)
        for name, spec in specs.items()
    ]
    for name, found in zip(specs, compile_all(jobs), strict=True):
        assert isinstance(found, Compiled), found
        assert not found.problems(chosen), name
        if name != "gate_grad":
            assert found.main.count(MATRIX_INSTRUCTIONS[device]) > 0, found.main.row()
            assert found.main.count("LDGSTS") > 0, found.main.row()

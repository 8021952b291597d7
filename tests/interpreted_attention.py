"""Kernels of routed-head attention against dense attention in float64; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from moefx import ops
from moefx.codegen import attention  # noqa: F401  (defines the operators)
from tests.interpreted_kernels import _poisoned_memory, error  # noqa: F401
from tests.test_ops_head_attention import dense

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def operands(queries: int, keys: int, heads: int, width: int, case: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(queries + width)
    q = torch.randn(2, queries, heads, width)
    k, v = torch.randn(2, keys, heads, width), torch.randn(2, keys, heads, width)
    gates = torch.rand(2, queries, heads) + 0.1
    if case == "half":
        gates *= torch.rand(2, queries, heads) < 0.5
    if case == "one head":
        gates[:, :, 1:] = 0.0
    if case == "none":
        gates.zero_()
    return [*(t.to(dtype) for t in (q, k, v)), gates]


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width", "case", "dtype"),
    [
        (37, 37, 3, 64, "half", torch.float32),
        (33, 41, 2, 72, "half", torch.float32),
        (19, 50, 2, 96, "all", torch.float32),
        (35, 17, 2, 128, "half", torch.float32),
        (40, 33, 3, 40, "one head", torch.float32),
        (1, 1, 1, 7, "all", torch.float32),
        (9, 8, 2, 16, "none", torch.float32),
        (37, 37, 2, 64, "half", torch.float16),
        (37, 37, 2, 72, "half", torch.bfloat16),
    ],
)
def test_kernels_equal_dense_attention(
    queries: int, keys: int, heads: int, width: int, case: str, dtype: torch.dtype
) -> None:
    given = [t.requires_grad_() for t in operands(queries, keys, heads, width, case, dtype)]
    scale = width**-0.5
    out, _ = torch.ops.moefx.head_attention_kernels(*given, scale)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, given, grad)
    exact = [t.detach().double().requires_grad_() for t in given]
    want = dense(*exact)
    wanted = list(torch.autograd.grad(want, exact, grad.double()))
    wanted[3] = wanted[3] * (exact[3] != 0)
    for one, other in zip((out.detach(), *got), (want.detach(), *wanted), strict=True):
        if float(other.norm()) < 1e-12:  # no chosen head, or a single key, on which nothing depends
            assert float(one.norm()) <= (0.0 if case == "none" else 1e-6)
        else:
            assert error(one, other) < TOLERANCE[dtype]


def test_repeated_runs_are_bitwise_equal() -> None:
    given = [t.requires_grad_() for t in operands(37, 37, 2, 24, "half", torch.float32)]

    def run() -> list[Tensor]:
        out, lse = torch.ops.moefx.head_attention_kernels(*given, 0.2)
        return [out, lse, *torch.autograd.grad(out.sum(), given)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backend_lowers_the_operator(caplog: pytest.LogCaptureFixture) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.gate, self.out = nn.Linear(24, 72), nn.Linear(24, 3), nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 8).unbind(2)
            return self.out(ops.head_attention(q, k, v, self.gate(x).relu()).flatten(2))

    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = Layer(), torch.randn(2, 11, 24)
    caplog.set_level(logging.INFO, logger="moefx.backend")
    options = {"kernels": "triton", "inner": "aot_eager"}
    compiled = torch.compile(layer, backend="moefx", fullgraph=True, options=options)
    leaves = list(layer.parameters())
    got, want = compiled(x), layer(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (got, want)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    assert "replaced 1 of 1 routed regions" in caplog.text
    assert "head_attention_forward_3x8_float32" in caplog.text

"""Kernels of routed tokens against float64, in Triton's interpreter; run by ``test_codegen_kernels.py``.

Shapes: T tokens of all samples, R of them taken, B samples, C = R / B, D columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moefx
from moefx import zoo
from moefx.codegen import Refusal, TokenLowering, lowerings, row_gradients, tokens
from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.kernels import TokenGatherSpec, TokenProgram, TokenScatterSpec
from moefx.graph.inputs import synthesise
from moefx.routing.tokens import gather_tokens, put_tokens
from tests.interpreted_kernels import TOLERANCE, _poisoned_memory, error  # noqa: F401
from tests.trace_support import QUIET, call
from tests.trace_support import tensors as leaves_of

pytestmark = [
    *[pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")],
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning"),
]
EPS = 1e-6


def normed(x: Tensor, norm: str) -> Tensor:
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], None, None, EPS)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) if norm else x


def modulate(
    z: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, other: Tensor, token: Tensor
) -> Tensor:
    return (z * weight + bias) * scale + shift + token * other


KINDS = ("column", "column", "sample", "sample", "row", "token")


def gather_spec(width: int, norm: str, dtype: str = "float32", keeps: bool = True) -> TokenGatherSpec:
    program = TokenProgram(width, dtype, trace_pointwise(modulate, width, 7), KINDS, norm, EPS if norm else 0.0)
    return TokenGatherSpec(program, keeps)


def operands(samples: int, kept: int, width: int, make: torch.dtype) -> list[Tensor]:
    sizes = {
        "column": (width,),
        "sample": (samples, 1, width),
        "row": (samples, kept, width),
        "token": (samples, kept, 1),
    }
    return [torch.randn(sizes[kind]).to(make if kind != "token" else torch.float32) for kind in KINDS]


def chosen(samples: int, total: int, kept: int) -> Tensor:
    """Return the flat positions [R] of different tokens of each sample."""
    index = torch.stack([torch.randperm(total)[:kept].sort().values for _ in range(samples)])
    return (index + torch.arange(samples).unsqueeze(1) * total).flatten()


def flat(operand: Tensor, samples: int, kept: int) -> Tensor:
    """Return an operand as [R, D] or [R, 1], in float64."""
    wide = operand.double()
    return wide if wide.dim() == 1 else wide.expand(samples, kept, wide.shape[-1]).reshape(samples * kept, -1)


def both(
    op: Callable[[list[Tensor], str], Any],
    key: str,
    given: list[Tensor],
    want: Callable[..., list[Tensor]],
    worst: float,
) -> None:
    """Compare results and gradients of an operator with those of torch in float64."""
    mine = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
    wide = [t.double().requires_grad_() if t.is_floating_point() else t for t in given]
    got = op(mine, key)
    got = got if isinstance(got, list) else [got]
    expected = want(*wide)
    seeds = [torch.randn_like(t) for t in got]
    for one, other in zip(got, expected, strict=True):
        assert error(one.detach(), other.detach()) < worst
    free = [t for t in mine if t.requires_grad]
    grads = torch.autograd.grad(got, free, seeds)
    wanted = torch.autograd.grad(expected, [t for t in wide if t.requires_grad], [s.double() for s in seeds])
    for i, (one, other) in enumerate(zip(grads, wanted, strict=True)):
        assert error(one, other) < worst, f"gradient {i}"
    for one, other in zip(grads, torch.autograd.grad(op(mine, key), free, seeds), strict=True):
        assert torch.equal(one, other), "repeated runs give the same bits"


def check_gather(samples: int, total: int, kept: int, width: int, norm: str, dtype: str) -> None:
    torch.manual_seed(total + width)
    make = getattr(torch, dtype)
    given = [
        torch.randn(samples * total, width).to(make),
        chosen(samples, total, kept),
        *operands(samples, kept, width, make),
    ]

    def want(x: Tensor, index: Tensor, *others: Tensor) -> list[Tensor]:
        rows = x[index]
        return [modulate(normed(rows, norm), *(flat(t, samples, kept) for t in others)), rows]

    key = tokens.register(gather_spec(width, norm, dtype))
    both(torch.ops.moefx.token_gather, key, given, want, TOLERANCE[dtype])


def check_scatter(samples: int, total: int, kept: int, width: int, dtype: str) -> None:
    torch.manual_seed(total + width)
    make = getattr(torch, dtype)
    program = TokenProgram(width, dtype, trace_pointwise(modulate, width, 7), KINDS)
    rows = torch.randn(samples, kept, width).to(make)
    x = torch.randn(samples * total, width).to(make)
    given = [x, chosen(samples, total, kept), rows, *operands(samples, kept, width, make)]

    def want(x: Tensor, index: Tensor, rows: Tensor, *others: Tensor) -> list[Tensor]:
        made = modulate(rows.reshape(-1, width), *(flat(t, samples, kept) for t in others))
        return [x.index_copy(0, index, made)]

    both(torch.ops.moefx.token_scatter, tokens.register(TokenScatterSpec(program)), given, want, TOLERANCE[dtype])


SIZES = [(2, 7, 3, 37), (1, 1, 1, 16), (3, 5, 5, 64)]


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("samples", "total", "kept", "width"), SIZES)
def test_gather_equals_float64(samples: int, total: int, kept: int, width: int, norm: str) -> None:
    check_gather(samples, total, kept, width, norm, "float32")


@pytest.mark.parametrize(("samples", "total", "kept", "width"), SIZES)
def test_scatter_equals_float64(samples: int, total: int, kept: int, width: int) -> None:
    check_scatter(samples, total, kept, width, "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(dtype: str) -> None:
    check_gather(2, 9, 4, 40, "layer", dtype)
    check_scatter(2, 9, 4, 40, dtype)


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.data(), st.sampled_from(["", "layer", "rms"]))
def test_any_shape(samples: int, total: int, data: st.DataObject, norm: str) -> None:
    kept, width = data.draw(st.integers(1, total)), data.draw(st.integers(9, 70))
    check_gather(samples, total, kept, width, norm, "float32")
    check_scatter(samples, total, kept, width, "float32")


def test_many_rows_are_summed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_gradients, "_PROGRAMS", 2)
    monkeypatch.setattr(row_gradients, "_CHUNK_ROWS", 4)
    check_gather(2, 13, 9, 20, "layer", "float32")
    check_scatter(2, 13, 9, 20, "float32")


def test_no_token_taken() -> None:
    x, none = torch.randn(6, 8, requires_grad=True), torch.empty(0, dtype=torch.int64)
    others = operands(2, 0, 8, torch.float32)
    out, rows = torch.ops.moefx.token_gather([x, none, *others], tokens.register(gather_spec(8, "layer")))
    assert out.shape == rows.shape == (0, 8)
    program = TokenProgram(8, "float32", trace_pointwise(modulate, 8, 7), KINDS)
    made = [x, none, torch.empty(2, 0, 8), *others]
    put = torch.ops.moefx.token_scatter(made, tokens.register(TokenScatterSpec(program)))
    assert torch.equal(put, x)
    assert torch.equal(torch.autograd.grad(put.sum(), x)[0], torch.ones(6, 8))


def test_a_token_taken_twice_gets_both_gradients() -> None:
    x, index = torch.randn(5, 24), torch.tensor([3, 0, 3, 3])
    key = tokens.register(TokenGatherSpec(TokenProgram(24, "float32", norm="layer", eps=EPS)))
    both(torch.ops.moefx.token_gather, key, [x, index], lambda x, i: [normed(x[i], "layer")], TOLERANCE["float32"])


def test_strided_rows_and_narrow_indices() -> None:
    wide = torch.randn(9, 48)
    key = tokens.register(TokenGatherSpec(TokenProgram(24, "float32", norm="rms", eps=EPS)))
    (out,) = torch.ops.moefx.token_gather([wide[:, :24], torch.tensor([8, 1], dtype=torch.int32)], key)
    assert error(out, normed(wide[[8, 1], :24].double(), "rms")) < TOLERANCE["float32"]


@pytest.mark.parametrize("norm", ["layer", ""])
def test_operators_keep_their_contract(norm: str) -> None:
    x, index = torch.randn(8, 16, requires_grad=True), chosen(2, 4, 3)
    others = [t.requires_grad_() for t in operands(2, 3, 16, torch.float32)]
    torch.library.opcheck(
        torch.ops.moefx.token_gather.default, ([x, index, *others], tokens.register(gather_spec(16, norm)))
    )
    program = TokenProgram(16, "float32", trace_pointwise(modulate, 16, 7), KINDS)
    rows = torch.randn(2, 3, 16, requires_grad=True)
    key = tokens.register(TokenScatterSpec(program))
    torch.library.opcheck(torch.ops.moefx.token_scatter.default, ([x, index, rows, *others], key))


class Block(nn.Module):
    """A block by token, with every part that a kernel may take."""

    def __init__(self, affine: bool, norm: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24, EPS, affine) if norm == "layer" else nn.RMSNorm(24, EPS, affine)
        self.linear = nn.Linear(24, 24)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor, scores: Tensor, condition: Tensor) -> Tensor:
        index = scores.sort(dim=-1, descending=True, stable=True).indices[..., :5]
        scale, shift, gate = condition.chunk(3, dim=-1)
        rows = gather_tokens(x, index)
        y = self.linear(self.norm(rows) * (1 + scale[:, None]) + shift[:, None])
        weight = scores.gather(1, index).unsqueeze(-1)
        return put_tokens(x, index, rows + gate.unsqueeze(1) * weight * y)


@pytest.mark.parametrize(
    ("affine", "norm", "inner"), [(False, "layer", "eager"), (True, "layer", "aot_eager"), (True, "rms", "aot_eager")]
)
def test_compiled_block_equals_eager(affine: bool, norm: str, inner: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    caplog.set_level(logging.INFO, logger="moefx.backend")
    torch.compiler.reset()
    block = Block(affine, norm)
    options = {"kernels": "triton", "inner": inner}
    compiled = torch.compile(block, backend="moefx", fullgraph=True, dynamic=True, options=options)
    compilations = 0
    for samples, total in ((2, 9), (3, 11)):
        given = [torch.randn(samples, total, 24), torch.randn(samples, total), torch.randn(samples, 72)]
        given = [t.requires_grad_() for t in given]
        got, want = compiled(*given), block(*given)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        seed, free = torch.randn_like(got), [*given, *block.parameters()]
        both_grads = (torch.autograd.grad(out, free, seed) for out in (got, want))
        for one, other in zip(*both_grads, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        # The first may take two attempts: the epsilon of a norm is a number that dynamo keeps open at first.
        compilations = compilations or caplog.text.count("replaced 2 of 2")
    assert caplog.text.count("replaced 2 of 2") == compilations > 0, "one graph for all batches"
    assert "token_gather" in caplog.text
    assert "token_scatter" in caplog.text


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_whole_models_equal_eager(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = moefx.transform(zoo.tiny(name), recipe="mixture-of-depths", capacity=0.5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs = synthesise(model, batch=2)
    caplog.set_level(logging.INFO, logger="moefx.backend")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options={"kernels": "triton", "inner": "eager"})
    results = []
    for run in (compiled, model):
        (out,) = leaves_of(call(run, inputs, grad=True))
        results.append(
            (out, *torch.autograd.grad(out.square().mean(), list(model.parameters()), materialize_grads=True))
        )
    scale = max(float(t.detach().abs().max()) for t in results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, scale), rtol=1e-3)
    assert "token_gather_layer_" in caplog.text
    assert "token_scatter_" in caplog.text


def test_lowering_is_found_in_a_dynamo_graph_only_where_a_norm_reads() -> None:
    graphs: list[Any] = []

    def keep(graph: Any, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    given = (torch.randn(2, 9, 24), torch.randn(2, 9), torch.randn(2, 72))
    torch.compiler.reset()
    torch.compile(Block(True, "layer"), backend=keep, fullgraph=True)(*given)
    ranking, gather, scatter = lowerings(graphs[0])
    assert isinstance(ranking, Refusal)
    assert "ranks tokens" in ranking.reason
    assert isinstance(gather, TokenLowering)
    assert isinstance(scatter, TokenLowering)
    assert gather.spec.program.operands == ("column", "column", "sample", "sample")
    assert sorted(scatter.spec.program.operands) == ["row", "sample", "token"]

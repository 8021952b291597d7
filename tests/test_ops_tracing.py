"""The dialect under fx, make_fx, export, compile and autocast: one graph for every number of tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moefx.errors import InputError
from moefx.ops import combine, group, grouped_linear
from tests.inductor import linkable

EXPERTS, WIDTH, HIDDEN, SLOTS = 4, 9, 15, 2
NAMES = {"moefx::group", "moefx::grouped_linear", "moefx::combine"}


class RoutedFFN(nn.Module):
    """The smallest routed FFN: a linear router, stacked experts, softmax over the chosen logits."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS + 1)  # the last choice is "no expert"
        self.w_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 3)
        self.b_in = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.to(dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TK, experts_TK = torch.topk(self.router(x_TD).float(), SLOTS)
        order, offsets = group(experts_TK, EXPERTS)
        hidden = F.gelu(grouped_linear(x_TD, self.w_in, self.b_in, order, offsets, SLOTS))
        return combine(grouped_linear(hidden, self.w_out, None, None, offsets), order, logits_TK.softmax(-1))


def parameters_of(dtype: torch.dtype = torch.float32, tokens: int = 11) -> dict[str, tuple[object, ...]]:
    chosen = torch.randint(-1, EXPERTS + 1, (tokens, SLOTS))
    order, offsets = group(chosen, EXPERTS)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    weight, bias = leaf(EXPERTS, HIDDEN, WIDTH), leaf(EXPERTS, HIDDEN)
    rows = tokens * SLOTS
    return {
        "group": (chosen, EXPERTS),
        "grouped_linear": (leaf(tokens, WIDTH), weight, bias, order, offsets, SLOTS),
        "grouped_linear, sorted, no bias": (leaf(rows, WIDTH), weight, None, None, offsets, 1),
        "grouped_linear_input_grad": (leaf(rows, HIDDEN).detach(), weight.detach(), order, offsets, SLOTS),
        "grouped_linear_weight_grad": (
            leaf(rows, HIDDEN).detach(),
            leaf(tokens, WIDTH).detach(),
            order,
            offsets,
            SLOTS,
        ),
        "grouped_linear_bias_grad": (leaf(rows, HIDDEN).detach(), offsets),
        "combine": (leaf(rows, WIDTH), order, torch.rand(tokens, SLOTS).requires_grad_()),
        "combine_backward": (
            leaf(tokens, WIDTH).detach(),
            leaf(rows, WIDTH).detach(),
            order,
            torch.rand(tokens, SLOTS),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [11, 0])
@pytest.mark.parametrize("case", list(parameters_of()))
def test_opcheck(case: str, tokens: int, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.moefx, case.split(",")[0]).default
    torch.library.opcheck(op, parameters_of(dtype, tokens)[case], rtol=1e-2, atol=1e-2)


def called(graph: torch.fx.Graph) -> set[str]:
    return {node.target.name() for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}


def test_symbolic_trace_and_make_fx_keep_the_operators() -> None:
    model, x, other = RoutedFFN(), torch.randn(6, WIDTH), torch.randn(13, WIDTH)
    traced = torch.fx.symbolic_trace(model)
    assert called(traced.graph) == NAMES
    assert torch.equal(traced(other), model(other))
    made = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    assert called(made.graph) >= NAMES
    assert torch.equal(made(other), model(other))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # run_decompositions copies torch's own tree specs
def test_export_with_a_dynamic_number_of_tokens() -> None:
    model = RoutedFFN()
    program = torch.export.export(
        model, (torch.randn(6, WIDTH),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    assert called(program.graph) >= NAMES
    assert called(program.run_decompositions().graph) >= NAMES
    for tokens in (6, 13, 200):
        x = torch.randn(tokens, WIDTH)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=linkable)])
def test_compile_takes_every_number_of_tokens_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = RoutedFFN()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (6, 13, 200):
        x = torch.randn(tokens, WIDTH, requires_grad=True)
        expected, found = model(x), compiled(x)
        torch.testing.assert_close(found, expected)
        leaves = [x, *model.parameters()]
        grads = torch.autograd.grad(found.square().sum(), leaves)
        for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_a_static_compile_recompiles_once_then_never() -> None:
    torch._dynamo.reset()
    model, counter = RoutedFFN(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (6, 13):
        compiled(torch.randn(tokens, WIDTH))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (14, 2, 77):
            compiled(torch.randn(tokens, WIDTH))
    assert counter.frame_count == 2


def test_meta_tensors_and_inference_mode() -> None:
    assert RoutedFFN().to("meta")(torch.empty(5, WIDTH, device="meta")).shape == (5, WIDTH)
    model, x = RoutedFFN(), torch.randn(5, WIDTH)
    with torch.inference_mode():
        inferred = model(x)
    assert torch.equal(inferred, model(x))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_like_linear_and_keeps_float32_gates(low: torch.dtype) -> None:
    x, weight = torch.randn(7, WIDTH, requires_grad=True), torch.randn(EXPERTS, HIDDEN, WIDTH, requires_grad=True)
    bias, order_of = torch.randn(EXPERTS, HIDDEN, requires_grad=True), torch.zeros(7, 1, dtype=torch.int64)
    order, offsets = group(order_of, EXPERTS)
    with torch.autocast("cpu", dtype=low):
        rows = grouped_linear(x, weight, bias, order, offsets, 1)
        dense = F.linear(x, weight[0], bias[0])
        combined = combine(rows, order, torch.full((7, 1), 1 / 3))
    assert rows.dtype == dense.dtype == combined.dtype == low
    torch.testing.assert_close(rows, dense, rtol=1e-2, atol=1e-2)
    assert torch.equal(combined, (rows.float() / 3).to(low))
    grads = torch.autograd.grad(rows.float().sum(), (x, weight, bias))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_autocast_mixes_dtypes_and_leaves_float64_alone() -> None:
    order, offsets = group(torch.zeros(3, 1, dtype=torch.int64), EXPERTS)
    weight = torch.randn(EXPERTS, HIDDEN, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = grouped_linear(torch.randn(3, WIDTH).bfloat16(), weight, None, order, offsets, 1)
        double = grouped_linear(torch.randn(3, WIDTH).double(), weight.double(), None, order, offsets, 1)
    assert (mixed.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False), pytest.raises(InputError, match="floating dtype"):
        grouped_linear(torch.randn(3, WIDTH).bfloat16(), weight, None, order, offsets, 1)


def test_compile_and_export_under_autocast() -> None:
    torch._dynamo.reset()
    model, x = RoutedFFN(), torch.randn(6, WIDTH)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    expected = function(x)
    assert expected.dtype == torch.bfloat16
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = torch.export.export(model, (x,), strict=False)
        assert program.module()(x).dtype == torch.bfloat16


@pytest.mark.parametrize("call", [lambda x, f: f(x), lambda x, f: torch.compile(f, backend="eager")(x)])
def test_a_wrong_shape_is_named_eagerly_and_while_compiling(call: Callable[..., Tensor]) -> None:
    torch._dynamo.reset()
    order, offsets = group(torch.zeros(3, 1, dtype=torch.int64), EXPERTS)

    def function(x: Tensor) -> Tensor:
        return grouped_linear(x, torch.zeros(EXPERTS, HIDDEN, WIDTH + 1), None, order, offsets, 1)

    with pytest.raises(Exception, match=r"moefx\.ops\.grouped_linear needs one weight"):
        call(torch.zeros(3, WIDTH), function)


def test_flops_are_counted_forward_and_backward() -> None:
    model, x = RoutedFFN(), torch.randn(10, WIDTH, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    experts = 2 * 10 * SLOTS * WIDTH * HIDDEN * 2
    router = 2 * 10 * WIDTH * (EXPERTS + 1)
    assert counter.get_total_flops() == 3 * (experts + router)

"""FFNs whose experts chose their tokens, by emitted kernels against float64; run by ``test_codegen_kernels.py``.

Shapes: T tokens, E experts, C tokens of each, R = E * C rows, D width, m hidden width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moefx.codegen import LinearSpec, RegionSpec, choice, trace_pointwise
from moefx.codegen.choice_spec import ChoiceSpec
from moefx.codegen.kernels import ChoiceSumSpec
from moefx.routing import Experts, LinearRouter, RoutedFFN, activation, random_weights
from moefx.routing.by_expert import ExpertChoice
from tests.interpreted_kernels import Function, _poisoned_memory, error, swiglu  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

TOLERANCE = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 3e-2}  # bfloat16 stores truncate in the interpreter


@dataclass
class Problem:
    """Random operands of experts that chose tokens."""

    count: int
    experts: int
    each: int
    width: int
    hidden: int
    case: str = "chosen"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        torch.manual_seed(self.count + self.hidden)
        make = getattr(torch, self.dtype)
        self.tokens = torch.stack([torch.randperm(self.count)[: self.each] for _ in range(self.experts)]).flatten()
        if self.case == "some of none":
            self.tokens[torch.rand(self.tokens.shape) < 0.3] = self.count
        if self.case == "repeated":
            self.tokens = torch.randint(0, self.count, self.tokens.shape)
        if self.case == "the same for all":
            self.tokens = torch.arange(self.each).repeat(self.experts)
        self.x = torch.randn(self.count, self.width).to(make)
        self.weights = torch.randn(self.tokens.shape)

    def operands(self, hidden: int) -> list[Tensor]:
        make = getattr(torch, self.dtype)
        shapes = [(self.hidden, self.width), (self.hidden,), (self.width, hidden), (self.width,)]
        drawn = [torch.randn(self.experts, *shape) / shape[-1] ** 0.5 for shape in shapes]
        return [self.x, self.tokens, *(one.to(make) for one in drawn), self.weights]

    def spec(self, act: Function) -> ChoiceSpec:
        epilogue = trace_pointwise(act, self.hidden)
        hidden = self.hidden // epilogue.inputs
        linears = (
            LinearSpec(self.width, hidden, self.dtype, True, True, 1, epilogue),
            LinearSpec(hidden, self.width, self.dtype, True),
        )
        return ChoiceSpec(RegionSpec(linears, placed=True), ChoiceSumSpec(self.width, self.dtype))

    def reference(self, act: Function, operands: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the result and all gradients in float64, row by row."""
        leaves = [t.double().requires_grad_() for t in operands if t.is_floating_point()]
        x, w_in, b_in, w_out, b_out, weights = leaves
        rows = [torch.zeros(self.width, dtype=torch.float64) + 0 * weights.sum()]
        where = [0]
        for r, token in enumerate(self.tokens.tolist()):
            if token < self.count:
                e = r // self.each
                h = act((w_in[e] @ x[token] + b_in[e])[None])[0]
                rows.append(weights[r] * (w_out[e] @ h + b_out[e]))
                where.append(token)
        out = torch.zeros(self.count, self.width, dtype=torch.float64).index_add(
            0, torch.tensor(where), torch.stack(rows)
        )
        found = torch.autograd.grad(out, leaves, grad.double(), allow_unused=True, materialize_grads=True)
        return out.detach(), list(found)


def check(problem: Problem, act: Function, tolerance: float | None = None) -> None:
    spec = problem.spec(act)
    operands = problem.operands(spec.region.linears[1].in_features)
    key, grad = choice.register(spec), torch.randn(problem.count, problem.width).to(problem.x.dtype)
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in operands]
    out, *_ = torch.ops.moefx.choice_train(leaves, key)
    got = torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad)
    want_out, want = problem.reference(act, operands, grad)
    limit = tolerance or TOLERANCE[problem.dtype]
    assert error(out.detach(), want_out) < limit
    assert torch.equal(torch.ops.moefx.choice(operands, key), out)
    for one, other, leaf in zip(got, want, ["x", "w_in", "b_in", "w_out", "b_out", "weights"], strict=True):
        assert torch.isfinite(one).all(), leaf
        assert float((one.double() - other).norm()) <= limit * float(other.norm()), leaf


@pytest.mark.parametrize(
    "problem",
    [
        Problem(37, 5, 14, 45, 70),
        Problem(24, 4, 24, 32, 64),
        Problem(41, 7, 12, 33, 100, "some of none"),
        Problem(30, 3, 28, 17, 26, "repeated"),
        Problem(50, 8, 9, 64, 128, "the same for all"),
        Problem(1, 1, 1, 16, 13),
        Problem(40, 64, 1, 24, 16),
        Problem(9, 3, 0, 24, 20),
        Problem(29, 3, 11, 40, 56, "some of none", "float16"),
        Problem(29, 3, 11, 40, 56, "chosen", "bfloat16"),
    ],
    ids=str,
)
def test_results_and_gradients_equal_float64(problem: Problem) -> None:
    check(problem, F.gelu)


def test_gated() -> None:
    check(Problem(19, 3, 8, 24, 2 * 35), swiglu)


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    count=st.sampled_from([1, 2, 7, 31]),
    experts=st.sampled_from([1, 3, 11]),
    share=st.floats(0, 1),
    width=st.sampled_from([1, 3, 17, 71]),
    hidden=st.sampled_from([2, 5, 37]),
    case=st.sampled_from(["chosen", "some of none", "repeated"]),
)
def test_any_shape(count: int, experts: int, share: float, width: int, hidden: int, case: str) -> None:
    check(Problem(count, experts, int(share * count), width, hidden, case), F.silu, 2e-5)


def test_operators_keep_the_rules_of_custom_operators() -> None:
    problem = Problem(13, 3, 4, 8, 12)
    key = choice.register(problem.spec(F.silu))
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in problem.operands(12)]
    rules = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.moefx.choice_train, (tensors, key), test_utils=rules)
    torch.library.opcheck(torch.ops.moefx.choice, ([t.detach() for t in tensors], key), test_utils=rules[:2])


class Block(nn.Module):
    """x + gate[b] * (routed(x) + shared(x)), as in a denoiser with a shared expert and adaLN."""

    def __init__(self, gated: bool, **options: object) -> None:
        super().__init__()
        weights = random_weights(24, 40, num_experts=4, gated=gated)
        experts = Experts(weights, activation("silu" if gated else "gelu", gated=gated))
        selector = ExpertChoice(1.5, **options)  # type: ignore[arg-type]
        self.routed = RoutedFFN(LinearRouter(24, 4), experts, selector=selector, mode="softmax_topk")
        self.shared = nn.Linear(24, 24)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return x + gate.unsqueeze(1) * (self.routed(x) + self.shared(x))


def results(run: Callable[..., Tensor], block: Block, inputs: list[Tensor]) -> list[Tensor]:
    out = run(*inputs)
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, [*inputs, *block.parameters()], torch.randn_like(out))]


@pytest.mark.parametrize(
    ("gated", "inner", "options"),
    [(True, "aot_eager", {}), (False, "eager", {"pool": 7})],
)
def test_compiled_training_equals_eager(
    gated: bool, inner: str, options: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    block = Block(gated, **options)
    eager = copy.deepcopy(block)
    settings = {"kernels": "triton", "inner": inner}
    compiled = torch.compile(block, backend="moefx", fullgraph=True, dynamic=True, options=settings)
    for samples in (2, 3):
        inputs = [torch.randn(samples, 9, 24, requires_grad=True), torch.randn(samples, 24, requires_grad=True)]
        got, want = results(compiled, block, inputs), results(eager, eager, inputs)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    again = results(compiled, block, inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True)), "the same bits"
    assert "replaced 1 of 1 routed regions by kernels, forward and backward" in caplog.text
    assert "choice_combine_add_24" in caplog.text
    assert inner == "aot_eager" or caplog.text.count("routed regions found") == 1, "one compilation"


def test_compiled_inference_equals_eager() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    block = Block(True).half().eval()
    settings = {"kernels": "triton", "inner": "eager"}
    compiled = torch.compile(block, backend="moefx", fullgraph=True, options=settings)
    x, gate = torch.randn(2, 9, 24).half(), torch.randn(2, 24).half()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, gate), block(x, gate), atol=1e-2, rtol=1e-2)

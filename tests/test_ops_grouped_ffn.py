"""``grouped_ffn`` expert by expert equals a loop over tokens in float64, and gives way where it must."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moefx.errors import MoefxError
from moefx.ops import FFNStack, _cpu, group, grouped_ffn
from moefx.routing.activation import Gated, squared_relu


@pytest.fixture(autouse=True)
def _no_case_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "SMALL_ELEMENTS", 0)


def make(experts: int, width: int, hidden: int, *, bias: bool, gated: bool, seed: int = 0) -> FFNStack:
    draws = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(experts, *shape, generator=draws, dtype=torch.float64).requires_grad_()

    up, gate = draw(hidden, width), draw(hidden, width)
    up_bias, gate_bias = draw(hidden), draw(hidden)
    whole = FFNStack(up, up_bias, gate, gate_bias, draw(width + 1, hidden))
    plain = whole if bias else whole._replace(up_bias=None, gate_bias=None)
    return plain if gated else plain._replace(gate=None, gate_bias=None)


def looped(x: Tensor, stack: FFNStack, act: Callable[..., Tensor], order: Tensor, chosen_TK: Tensor) -> Tensor:
    """Return the rows one by one."""
    flat, rows = chosen_TK.reshape(-1).tolist(), []
    for pair in order.tolist():
        e, token = flat[pair], x[pair // chosen_TK.shape[1]]
        if not 0 <= e < stack.up.shape[0]:
            rows.append((token * 0).sum().expand(stack.down.shape[1]))
            continue
        z = [F.linear(token, stack.up[e], None if stack.up_bias is None else stack.up_bias[e])]
        if stack.gate is not None:
            z.append(F.linear(token, stack.gate[e], None if stack.gate_bias is None else stack.gate_bias[e]))
        rows.append(F.linear(act(*z), stack.down[e]))
    return torch.stack(rows)


def leaves_of(x: Tensor, stack: FFNStack) -> list[Tensor]:
    return [t for t in (x, *stack) if t is not None and t.requires_grad]


def took_the_loop(rows: Tensor) -> bool:
    return type(rows.grad_fn).__name__ == "_GroupedFFNBackward"


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([F.gelu, torch.tanh, squared_relu]),
    st.integers(0, 99),
)
@settings(max_examples=40)
def test_rows_and_gradients_equal_a_loop_over_tokens(
    sizes: tuple[int, int, int, int, int], bias: bool, gated: bool, function: Callable[[Tensor], Tensor], seed: int
) -> None:
    tokens, slots, experts, width, hidden = sizes
    stack = make(experts, width, hidden, bias=bias, gated=gated, seed=seed)
    act: Any = Gated(function) if gated else function
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=draws, dtype=torch.float64).requires_grad_()
    chosen = torch.randint(-1, experts + 2, (tokens, slots), generator=draws)  # some slots are empty
    order, offsets = group(chosen, experts)
    found, wanted = grouped_ffn(x, stack, act, order, offsets, slots), looped(x, stack, act, order, chosen)
    assert took_the_loop(found)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    seed_RN = torch.randn(found.shape, generator=draws, dtype=torch.float64)
    ours = torch.autograd.grad(found, leaves_of(x, stack), seed_RN)
    theirs = torch.autograd.grad(wanted, leaves_of(x, stack), seed_RN, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(grouped_ffn(x, stack, act, order, offsets, slots), found)


def case(gated: bool = False, dtype: torch.dtype = torch.float64) -> tuple[Tensor, FFNStack, Tensor, Tensor, int]:
    x, stack = torch.randn(9, 6, dtype=dtype), make(4, 6, 10, bias=True, gated=gated)
    stack = FFNStack(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in stack))
    return (x.requires_grad_(), stack, *group(torch.randint(0, 3, (9, 2)), 4), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_give_what_the_operators_give(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, stack, order, offsets, k = case(gated=True, dtype=dtype)

    def run() -> list[Tensor]:
        rows = grouped_ffn(x, stack, Gated(F.silu), order, offsets, k)
        assert took_the_loop(rows) == (_cpu.SMALL_ELEMENTS == 0)
        return [rows.detach(), *torch.autograd.grad(rows, leaves_of(x, stack), torch.ones_like(rows))]

    found = run()
    monkeypatch.setattr(_cpu, "SMALL_ELEMENTS", 10**9)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, run(), strict=True):
        assert float((one - other).norm() / other.norm()) < limit
    assert found[2][3].count_nonzero() == 0, "nobody chose the last expert"


def test_frozen_weights_get_no_gradient_and_inputs_may_need_none() -> None:
    x, stack, order, offsets, k = case()
    wanted = torch.autograd.grad(grouped_ffn(x, stack, F.gelu, order, offsets, k).sum(), [stack.up, stack.down])
    stack.up.requires_grad_(False), stack.up_bias.requires_grad_(False)  # type: ignore[union-attr]
    grouped_ffn(x.detach(), stack, F.gelu, order, offsets, k).sum().backward()
    torch.testing.assert_close(stack.down.grad, wanted[1])
    assert stack.up.grad is None
    stack.up.requires_grad_(True), stack.down.requires_grad_(False)
    grouped_ffn(x.detach(), stack, F.gelu, order, offsets, k).sum().backward()
    torch.testing.assert_close(stack.up.grad, wanted[0])


class Noisy(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.dropout(z, 0.5)


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return F.leaky_relu(z) * self.slope


def _hooked() -> nn.Module:
    act = nn.GELU()
    act.register_forward_hook(lambda *_: None)
    return act


@pytest.mark.parametrize(
    "act", [nn.SiLU(inplace=True), partial(F.relu, inplace=True), Noisy(), Learned(), _hooked(), torch.relu_]
)
def test_what_cannot_be_computed_twice_is_computed_once(act: Callable[..., Any]) -> None:
    x, stack, order, offsets, k = case()
    before = torch.get_rng_state()
    rows = grouped_ffn(x, stack, act, order, offsets, k)
    assert not took_the_loop(rows)
    torch.set_rng_state(before)
    assert torch.equal(grouped_ffn(x, stack, act, order, offsets, k), rows), "trying a function draws nothing"
    rows.sum().backward()
    if isinstance(act, Learned):
        assert float(act.slope.grad.abs()) > 0  # type: ignore[union-attr]


def test_tracers_modes_and_autocast_see_the_operators() -> None:
    x, stack, order, offsets, k = case(dtype=torch.float32)

    def run(x: Tensor) -> Tensor:
        return grouped_ffn(x, stack, F.gelu, order, offsets, k)

    wanted = run(x)
    traced = make_fx(run)(x)
    assert [n.target for n in traced.graph.nodes].count(torch.ops.moefx.grouped_linear.default) == 2
    with FlopCounterMode(display=False) as counter:
        run(x)
    assert counter.get_total_flops() == 2 * 18 * 10 * (6 + 7)
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), wanted)
    with torch.autocast("cpu"):
        assert run(x).dtype == torch.bfloat16


def test_a_second_derivative_is_an_error() -> None:
    x, stack, order, offsets, k = case()
    (first,) = torch.autograd.grad(grouped_ffn(x, stack, F.gelu, order, offsets, k).sum(), x, create_graph=True)
    with pytest.raises(MoefxError, match="second derivative"):
        first.sum().backward()

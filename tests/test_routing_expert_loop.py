"""Experts one after the other (eager, CPU, no gradients, empty slots) against their sum written out, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.routing import Experts, activation, expert_loop
from moefx.routing.expert_loop import loop_pays
from moefx.routing.weights import FFNWeights, random_weights

E = 5


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_loop, "_SMALL_ELEMENTS", 1)


def _experts(gated: bool = False, bias: bool = True, hidden: int = 3, dtype: torch.dtype = torch.float64) -> Experts:
    draws = torch.Generator().manual_seed(0)
    weights = random_weights(6, hidden, num_experts=E, out_dim=4, gated=gated, bias=bias, generator=draws, dtype=dtype)
    return Experts(weights, activation("gelu", gated=gated))


def _inputs(tokens: int, slots: int, empty: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    chosen = torch.rand((tokens, E), generator=draws).argsort(1)[:, :slots]
    chosen = torch.where(torch.rand(chosen.shape, generator=draws) < empty, E, chosen)
    x = torch.randn((tokens, 6), generator=draws, dtype=dtype)
    return x, chosen, torch.rand(chosen.shape, generator=draws, dtype=dtype) * (chosen < E)


def _written_out(experts: Experts, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
    w: FFNWeights = experts.weights()
    y = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(len(x)):
        for e, g in zip(chosen[t].tolist(), gates[t], strict=True):
            if e < E:
                up = w.w_in[e] @ x[t] + (0 if w.b_in is None else w.b_in[e])
                if w.w_gate is not None:
                    up = F.gelu(w.w_gate[e] @ x[t] + (0 if w.b_gate is None else w.b_gate[e])) * up
                else:
                    up = F.gelu(up)
                y[t] += g * (w.w_out[e] @ up)
    return y if w.b_out is None else y + w.b_out


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 9),
    slots=st.integers(1, E),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
    gated=st.booleans(),
    bias=st.booleans(),
    hidden=st.sampled_from([3, 7]),
)
def test_the_sum_over_chosen_experts(
    tokens: int, slots: int, empty: float, gated: bool, bias: bool, hidden: int
) -> None:
    experts, (x, chosen, gates) = _experts(gated, bias, hidden), _inputs(tokens, slots, empty)
    with torch.no_grad():
        assert loop_pays(x, experts.weights(), gates, torch.tensor([0, 0])) == (gates.numel() > 0)
        found, wanted = experts(x, chosen, gates), _written_out(experts, x, chosen, gates)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(experts(x, chosen, gates).detach(), wanted, rtol=1e-12, atol=1e-12)


def test_a_token_without_an_expert_may_be_nan_and_an_expert_may_come_twice() -> None:
    experts, (x, chosen, gates) = _experts(), _inputs(6, 2, 0.0)
    chosen[0], gates[0], x[0] = E, 0, float("nan")
    chosen[1] = 2
    with torch.no_grad():
        found = experts(x, chosen, gates)
    assert experts.b_out is not None
    assert torch.equal(found[0], experts.b_out)
    torch.testing.assert_close(found[1:], _written_out(experts, x, chosen, gates)[1:].detach(), rtol=1e-12, atol=1e-12)


def test_what_others_must_see_stays_in_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, chosen, gates) = _experts(dtype=torch.float32), _inputs(7, E, 0.5, torch.float32)
    weights, offsets = experts.weights(), torch.tensor([0, 1])
    assert not loop_pays(x, weights, gates, offsets)  # gradients are on
    with torch.no_grad():
        assert loop_pays(x, weights, gates, offsets)
        assert not loop_pays(x, weights, gates, torch.tensor([0, gates.numel()]))
        assert not loop_pays(x.bfloat16(), weights, gates, offsets)
        assert not loop_pays(x.to("meta"), weights, gates, offsets)
        monkeypatch.setattr(expert_loop, "_SMALL_ELEMENTS", 2**20)
        assert not loop_pays(x, weights, gates, offsets)
        monkeypatch.setattr(expert_loop, "_SMALL_ELEMENTS", 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not loop_pays(x, weights, gates, offsets)
        eager = experts(x, chosen, gates)
        for other in (torch.compile(experts, fullgraph=True, backend="aot_eager"), _traced(experts, x, chosen, gates)):
            torch.testing.assert_close(other(x, chosen, gates), eager)
            again = _inputs(7, E, 1.0, torch.float32)  # an empty routing: nothing of the first one is in the graph
            torch.testing.assert_close(other(*again), experts(*again))


def _traced(experts: Experts, *inputs: Any) -> Any:
    return torch.fx.experimental.proxy_tensor.make_fx(lambda *args: experts(*args))(*inputs)


@pytest.mark.parametrize("slots", [2, E])
def test_gradients_are_those_of_the_operators(slots: int) -> None:
    experts, (x, chosen, gates) = _experts(), _inputs(4, slots, 0.5)
    x.requires_grad_()
    (found,) = torch.autograd.grad(experts(x, chosen, gates).square().sum(), x)
    (wanted,) = torch.autograd.grad(_written_out(experts, x, chosen, gates).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

"""Mixture of heads against its equations."""

import copy

import pytest
import torch

from moefx.errors import InputError, OptionError
from moefx.routing import HeadGate, apply_head_gates

D = 10


def written_out(gate: HeadGate, token: torch.Tensor) -> list[torch.Tensor]:
    """The gates of one token, head by head, shared heads first."""
    zero = torch.zeros((), dtype=token.dtype)
    shared: list[torch.Tensor] = []
    routed: list[torch.Tensor] = [zero] * gate.routed
    if gate.shared:
        e = (gate.shared_weight @ token).exp()
        shared = [gate.shared * value / e.sum() for value in e]
    if gate.top_k:
        e = (gate.routed_weight @ token).exp()
        chosen = sorted(range(gate.routed), key=lambda h: (-e[h].item(), h))[: gate.top_k]
        mass = sum(e[h] for h in chosen)
        routed = [gate.top_k * e[h] / mass if h in chosen else zero for h in range(gate.routed)]
    if gate.shared and gate.top_k:
        e = (gate.balance_weight @ token).exp()
        shared = [value * 2 * e[0] / e.sum() for value in shared]
        routed = [value * 2 * e[1] / e.sum() for value in routed]
    return shared + routed


@pytest.mark.parametrize(("shared", "k"), [(2, 2), (2, 4), (0, 3), (6, 0), (2, 0), (1, 5)])
def test_gates_follow_the_equations(shared: int, k: int) -> None:
    gate = HeadGate(D, 6, shared=shared, top_k=k, std=0.7).double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    expected = torch.stack([torch.stack(written_out(gate, token)) for token in x.flatten(0, 1)]).reshape(2, 5, 6)
    torch.testing.assert_close(gate(x), expected, rtol=1e-12, atol=0)
    assert (gate(x) != 0).sum(-1).eq(shared + k).all()


@pytest.mark.parametrize("shared", [0, 1, 2, 6])
def test_zero_routers_and_all_heads_are_the_identity(shared: int) -> None:
    gate = HeadGate(D, 6, shared=shared)
    gates = gate(torch.randn(2, 5, D) * 100)
    torch.testing.assert_close(gates, torch.ones(2, 5, 6), rtol=0, atol=1e-6)
    y = torch.randn(2, 5, 24)
    torch.testing.assert_close(apply_head_gates(y, gates), y)


def test_the_mean_gate_over_active_heads_is_one_when_shared_and_routed_balance() -> None:
    gate = HeadGate(D, 8, shared=3, top_k=3, std=0.7)
    torch.testing.assert_close(gate(torch.randn(4, 9, D)).sum(-1), torch.full((4, 9), 6.0), rtol=0.5, atol=0)
    torch.nn.init.zeros_(gate.balance_weight)
    torch.testing.assert_close(gate(torch.randn(4, 9, D)).sum(-1), torch.full((4, 9), 6.0))


def test_shared_heads_may_be_any_heads() -> None:
    first = HeadGate(D, 6, shared=2, top_k=2, std=0.7)
    chosen = HeadGate(D, 6, shared=2, top_k=2, shared_heads=[4, 1])
    weights = {name: value for name, value in first.state_dict().items() if name != "order"}
    chosen.load_state_dict(weights, strict=False)
    x = torch.randn(2, 5, D)
    assert torch.equal(chosen(x)[..., [4, 1, 0, 2, 3, 5]], first(x))
    loaded = HeadGate(D, 6, shared=2, top_k=2, device="meta")
    loaded.load_state_dict(chosen.state_dict(), assign=True)
    assert torch.equal(loaded(x), chosen(x))
    assert loaded.record.load.sum() == 1


def test_gates_multiply_heads_before_the_output_projection() -> None:
    y, gates, w = torch.randn(2, 3, 8), torch.rand(2, 3, 4), torch.randn(5, 8)
    expected = sum(gates[..., h : h + 1] * (y[..., 2 * h : 2 * h + 2] @ w[:, 2 * h : 2 * h + 2].T) for h in range(4))
    torch.testing.assert_close(apply_head_gates(y, gates) @ w.T, expected)
    assert apply_head_gates(y.bfloat16(), gates).dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"\[B, T, H\*d\]"):
        apply_head_gates(y, torch.rand(2, 3, 3))


def test_all_routers_get_gradients_in_eval_mode() -> None:
    gate = HeadGate(D, 6, shared=2, top_k=2).eval()  # zero routers
    y = torch.randn(2, 5, 24)
    apply_head_gates(y, gate(torch.randn(2, 5, D))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in gate.parameters())


def test_gates_are_float32_in_a_low_precision_model() -> None:
    gate = HeadGate(D, 6, shared=2, top_k=2, std=0.7)
    x = torch.randn(2, 5, D).bfloat16()
    expected = gate(x.float())
    low = copy.deepcopy(gate).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low(x), expected)
    assert low.order.dtype == torch.int64


def test_no_tokens_and_meta() -> None:
    assert HeadGate(D, 6, shared=2, top_k=2)(torch.zeros(2, 0, D)).shape == (2, 0, 6)
    assert HeadGate(D, 6, shared=2, top_k=0, device="meta")(torch.empty(2, 5, D, device="meta")).shape == (2, 5, 6)


@pytest.mark.parametrize(
    "options",
    [
        {"shared": 7},
        {"top_k": 7},
        {"top_k": 0},
        {"shared": 2, "shared_heads": [1, 1]},
        {"shared": 1, "shared_heads": [6]},
    ],
)
def test_impossible_budgets_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="6 heads"):
        HeadGate(D, 6, **options)


def test_compiles_whole() -> None:
    gate = HeadGate(D, 6, shared=2, top_k=2, std=0.7)
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(2, tokens, D)
        torch.testing.assert_close(compiled(x), gate(x))

"""Mixture of depths against its equation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from moefx.errors import OptionError
from moefx.routing import TokenRouter, gather_rows, gather_tokens

D = 6


class Block(nn.Module):
    """A block with its own skip connection that mixes tokens and reads a table per position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        attention = (x @ x.transpose(1, 2)).softmax(-1)
        return x + attention @ self.linear(x * rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_at_weight_one_is_the_dense_block_to_the_bit(dtype: torch.dtype) -> None:
    block, router = Block().to(dtype), TokenRouter(D).to(dtype)
    x, table = torch.randn(2, 9, D).to(dtype), torch.randn(9, D).to(dtype)
    routed = router(x, lambda tokens, index: block(tokens, gather_rows(table, index)))
    assert torch.equal(routed, block(x, table))


@pytest.mark.parametrize("capacity", [0.125, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_equation(capacity: float, bias: bool) -> None:
    block, router = Block().double(), TokenRouter(D, capacity, bias=bias, std=0.7).double()
    x, table = torch.randn(3, 10, D, dtype=torch.float64), torch.randn(10, D, dtype=torch.float64)
    expected = x.clone()
    for b in range(3):
        r = x[b] @ router.weight + (1 if bias else 0)
        chosen = sorted(sorted(range(10), key=lambda t: (-r[t].item(), t))[: int(capacity * 10)])
        after = block(x[b : b + 1, chosen], table[chosen])[0]
        for position, t in enumerate(chosen):
            expected[b, t] = x[b, t] + r[t] * (after[position] - x[b, t])
    ours = router(x, lambda tokens, index: block(tokens, gather_rows(table, index)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 20), st.sampled_from([0.1, 0.29, 0.5, 0.7, 1 / 3, 1.0]))
def test_the_number_of_tokens_is_the_floor(total: int, capacity: float) -> None:
    exact = {0.1: (1, 10), 0.29: (29, 100), 0.5: (1, 2), 0.7: (7, 10), 1 / 3: (1, 3), 1.0: (1, 1)}[capacity]
    router = TokenRouter(D, capacity)
    assert router.tokens(total) == total * exact[0] // exact[1]
    x = torch.randn(2, total, D)
    y = router(x, lambda tokens, index: tokens + 1)
    assert ((y != x).any(-1).sum(-1) == router.tokens(total)).all()


def test_selected_tokens_are_ascending_unique_and_tied_to_the_first() -> None:
    x = torch.randn(4, 12, D)
    index, r = TokenRouter(D, 0.5, std=1.0).select(x)
    assert (index.diff(dim=-1) > 0).all()
    assert r.shape == (4, 6)
    assert TokenRouter(D, 0.5).select(x).tokens.tolist() == [list(range(6))] * 4


def test_no_tokens_and_capacity_below_one_token() -> None:
    def never(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    x = torch.randn(2, 3, D)
    assert torch.equal(TokenRouter(D, 0.25)(x, never), x)
    assert TokenRouter(D)(x[:, :0], never).shape == (2, 0, D)


def test_the_router_learns_through_the_update() -> None:
    router = TokenRouter(D, 0.5)
    x = torch.randn(2, 8, D)
    router(x, lambda tokens, index: tokens * 2).square().mean().backward()
    assert router.weight.grad.abs().max() > 0
    assert router.bias.grad.abs() > 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    router, x = TokenRouter(D, 0.5, std=1.0), torch.randn(3, 8, D)
    assert torch.equal(router(x, lambda t, i: t * 2)[:1], router(x[:1], lambda t, i: t * 2))


def test_side_inputs_follow_the_tokens() -> None:
    index = torch.tensor([[0, 2], [1, 3]])
    values = torch.randn(2, 4, 3, 5)
    expected = torch.stack([values[0, [0, 2]], values[1, [1, 3]]])
    assert torch.equal(gather_tokens(values, index), expected)
    assert torch.equal(gather_tokens(values[..., 0, 0], index), expected[..., 0, 0])
    table = torch.randn(4, 7)
    assert torch.equal(gather_rows(table, index), torch.stack([table[[0, 2]], table[[1, 3]]]))


@pytest.mark.parametrize("capacity", [0.0, -1.0, 1.5])
def test_impossible_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(OptionError, match="capacity"):
        TokenRouter(D, capacity)


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    router = TokenRouter(D, 0.5, std=1.0)
    counter = CompileCounter()
    compiled = torch.compile(lambda x: router(x, lambda t, i: t.sin()), fullgraph=True, dynamic=True, backend=counter)
    for tokens in (9, 14, 23):
        x = torch.randn(2, tokens, D)
        torch.testing.assert_close(compiled(x), router(x, lambda t, i: t.sin()))
    assert counter.frame_count == 1

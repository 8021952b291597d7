"""``activate`` equals the function it is given, and overwrites only where nobody could see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from moefx.ops import activate

KNOWN = [
    F.gelu,
    partial(F.gelu, approximate="tanh"),
    F.silu,
    F.relu,
    F.sigmoid,
    torch.tanh,
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.ReLU(),
    nn.Sigmoid(),
]
OTHER = [
    F.mish,
    nn.Softplus(),
    lambda rows: rows.square(),
    partial(torch.pow, exponent=3),
    partial(F.silu, inplace=False),
]


@pytest.mark.parametrize("act", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_function_is_exact_and_reuses_the_rows(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    rows = torch.randn(7, 5, dtype=dtype)
    expected = act(rows)
    with torch.no_grad():
        found = activate(act, rows)
    assert torch.equal(found, expected)
    assert found.data_ptr() == rows.data_ptr()


@pytest.mark.parametrize("act", OTHER)
def test_any_other_function_is_called(act: Callable[[Tensor], Tensor]) -> None:
    rows = torch.randn(7, 5)
    with torch.no_grad():
        assert torch.equal(activate(act, rows), act(rows))


def test_gradients_hooks_and_tracers_see_the_function_itself() -> None:
    rows, hooked, calls = torch.randn(3, 4), nn.GELU(), []
    before = rows.clone()
    activate(F.gelu, rows)
    hooked.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        activate(hooked, rows)
        made = make_fx(lambda rows: activate(F.gelu, rows))(rows)
        traced = torch.fx.symbolic_trace(lambda rows: activate(F.gelu, rows))
        torch.compile(lambda rows: activate(F.gelu, rows), backend="eager", fullgraph=True)(rows)
    assert calls == [1]
    assert torch.equal(rows, before)
    assert [n.target for n in made.graph.nodes if n.op == "call_function"] == [torch.ops.aten.gelu.default]
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [F.gelu]

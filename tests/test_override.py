"""Routing overrides: what is chosen inside the block, and that nothing stays behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moefx.errors import InputError, OptionError
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights
from moefx.routing.override import override

E, D = 6, 8


def layer(top_k: int = 2, mode: str = "softmax_topk_renorm") -> RoutedFFN:
    seeded = torch.Generator().manual_seed(0)
    experts = Experts(random_weights(D, 12, num_experts=E, generator=seeded), F.gelu)
    router = LinearRouter(D, E, std=1.0, generator=seeded)
    return RoutedFFN(router, experts, top_k=top_k, mode=mode).double().eval()


@torch.no_grad()
def expected(model: RoutedFFN, x: torch.Tensor, ranks: list[int], allowed: set[int]) -> torch.Tensor:
    """Compute token by token, with Python's own sort."""
    logits = model.router(x)
    out = torch.zeros_like(x)
    w = model.experts
    for t in range(len(x)):
        order = sorted(allowed, key=lambda e: (-float(logits[t, e]), e))
        chosen = [order[r] for r in ranks if r < len(order)]
        gates = torch.stack([logits[t, e] for e in chosen]).softmax(0)
        for e, g in zip(chosen, gates, strict=True):
            up = F.gelu(w.w_in[e] @ x[t] + (0 if w.b_in is None else w.b_in[e]))
            out[t] += g * (w.w_out[e] @ up)
    return out if w.b_out is None else out + w.b_out


@pytest.mark.parametrize(
    ("ask", "ranks", "allowed"),
    [
        ({"top_k": 1}, [0], set(range(E))),
        ({"top_k": 4}, [0, 1, 2, 3], set(range(E))),
        ({"ranks": [1]}, [1], set(range(E))),
        ({"ranks": [2, 0]}, [2, 0], set(range(E))),
        ({"experts": [1, 4, 5]}, [0, 1], {1, 4, 5}),
        ({"top_k": 3, "experts": [2, 3]}, [0, 1, 2], {2, 3}),
    ],
)
def test_the_choice_inside_and_after(ask: dict[str, object], ranks: list[int], allowed: set[int]) -> None:
    model = layer()
    x = torch.randn(9, D, dtype=torch.float64)
    before = model(x)
    with override(model, **ask) as names:
        assert names == [""]
        torch.testing.assert_close(model(x), expected(model, x, ranks, allowed), rtol=1e-10, atol=1e-12)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(layer().state_dict())


def test_nested_overrides_and_errors_inside_are_undone() -> None:
    model = layer()
    x = torch.randn(5, D, dtype=torch.float64)
    before = model(x)
    with override(model, top_k=1), override(model, ranks=[1]):
        torch.testing.assert_close(model(x), expected(model, x, [1], set(range(E))))
    with pytest.raises(ZeroDivisionError), override(model, top_k=1):
        _ = 1 / 0
    assert torch.equal(model(x), before)


def test_layers_are_chosen_by_name() -> None:
    model = nn.ModuleDict({"a": layer(), "b": layer()})
    x = torch.randn(5, D, dtype=torch.float64)
    before = model["a"](x)
    with override(model, top_k=1, layers=["b"]) as names:
        assert names == ["b"]
        assert torch.equal(model["a"](x), before)
        assert not torch.equal(model["b"](x), before)


@pytest.mark.parametrize(
    ("ask", "error", "found"),
    [
        ({}, OptionError, "nothing to override"),
        ({"top_k": 1, "ranks": [0]}, OptionError, "give one"),
        ({"top_k": 0}, OptionError, "nothing to override"),
        ({"top_k": 7}, InputError, "index 6 of 6"),
        ({"ranks": [-1]}, InputError, "index -1 of 6"),
        ({"experts": []}, InputError, "no expert allowed"),
        ({"top_k": 1, "layers": ["x"]}, InputError, "no routed layer 'x'"),
    ],
)
def test_impossible_overrides(ask: dict[str, object], error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=found), override(layer(), **ask):
        pass
    with pytest.raises(InputError, match="transform the model"), override(nn.Linear(2, 2), top_k=1):
        pass


def test_a_compiled_model_compiles_once_for_all_overrides() -> None:
    torch._dynamo.reset()
    model = layer()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, D, dtype=torch.float64)
    plain = compiled(x)
    with override(model, ranks=[1]):
        compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for ranks in ([0], [1, 0], [3]):
            with override(model, ranks=ranks):
                torch.testing.assert_close(compiled(x), expected(model, x, ranks, set(range(E))))
        assert torch.equal(compiled(x), plain)

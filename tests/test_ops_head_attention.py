"""``moefx::head_attention`` against dense attention times gates."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx import ops
from moefx.errors import InputError, MoefxError
from moefx.ops.head_attention import head_attention_backward_op, head_attention_op

module = importlib.import_module("moefx.ops.head_attention")


def operands(
    samples: int = 2, queries: int = 7, keys: int = 5, heads: int = 3, width: int = 4, share: float = 0.5
) -> list[Tensor]:
    torch.manual_seed(queries + keys)
    q = torch.randn(samples, queries, heads, width, dtype=torch.float64)
    k, v = (torch.randn(samples, keys, heads, width, dtype=torch.float64) for _ in range(2))
    gates = torch.rand(samples, queries, heads, dtype=torch.float64) + 0.1
    return [q, k, v, gates * (torch.rand_like(gates) < share)]


def dense(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)
    return out * gates.unsqueeze(-1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 2),
    queries=st.integers(1, 9),
    keys=st.integers(0, 8),
    heads=st.integers(1, 4),
    width=st.sampled_from([1, 4, 9]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    small=st.sampled_from([0, 2**19]),
)
def test_equals_dense_attention_times_gates(
    samples: int, queries: int, keys: int, heads: int, width: int, share: float, small: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SMALL", small)  # one call for each head, or one for all
        against_dense(samples, queries, keys, heads, width, share)


def against_dense(samples: int, queries: int, keys: int, heads: int, width: int, share: float) -> None:
    given_ = [t.requires_grad_() for t in operands(samples, queries, keys, heads, width, share)]
    got, want = ops.head_attention(*given_), dense(*given_)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    grad = torch.randn_like(got)
    *inner, dgates = torch.autograd.grad(got, given_, grad)
    *wanted, dense_dgates = torch.autograd.grad(want, given_, grad)
    torch.testing.assert_close(inner, wanted, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(dgates, dense_dgates * (given_[3] != 0), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("small", [0, 2**19])
def test_what_a_zero_gate_hides_is_never_read(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SMALL", small)
    q, k, v, gates = operands()
    gates[0, 3] = 0.0
    q[0, 3] = float("nan")
    given_ = [t.requires_grad_() for t in (q, k, v, gates)]
    out = ops.head_attention(*given_)
    assert torch.isfinite(out).all()
    assert not out[0, 3].any()
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.sum(), given_))


def test_gradients_by_differences() -> None:
    q, k, v, gates = operands(1, 3, 4, 2, 3, 1.0)
    assert torch.autograd.gradcheck(ops.head_attention, [t.requires_grad_() for t in (q, k, v, gates)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_keeps_the_rules_of_custom_operators(dtype: torch.dtype) -> None:
    q, k, v, gates = operands()
    given_ = (*(t.to(dtype).requires_grad_() for t in (q, k, v)), gates.float().requires_grad_())
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    tests += ["test_aot_dispatch_dynamic"] if dtype == torch.float32 else []
    torch.library.opcheck(torch.ops.moefx.head_attention, (*given_, 0.5), test_utils=tests)


@pytest.mark.parametrize("logits", [1, 100, 2**24])
def test_the_device_forms_give_the_same(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense forms, for devices on which reading a gate would stall the queue, run on CPU as well."""
    monkeypatch.setattr(module, "_LOGITS", logits)  # one query, three or all of them at a time
    q, k, v, gates = operands()
    gates[0, 3] = 0.0
    q[0, 3] = float("nan")
    raw = torch.ops.moefx.head_attention.default
    out, lse = raw(q, k, v, gates, 0.5)
    torch.testing.assert_close(head_attention_op._init_fn(q, k, v, gates, 0.5), (out, lse))
    grad = torch.randn_like(out)
    want = torch.ops.moefx.head_attention_backward(grad, q, k, v, gates, out, lse, 0.5)
    torch.testing.assert_close(head_attention_backward_op._init_fn(grad, q, k, v, gates, out, lse, 0.5), tuple(want))


def peak(run: Callable[[], Any]) -> int:
    """Return the bytes of tensors, also those inside of kernels, that a call holds at most beyond its inputs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: int(e.start_ns()))))


def test_memory_does_not_grow_with_queries_times_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, gates = (t.float() for t in operands(1, 2048, 2048, 2, 16))
    logits = 2048 * 2048 * 4  # of one head
    free = [t.requires_grad_() for t in (q, k, v, gates)]
    assert peak(lambda: torch.autograd.grad(ops.head_attention(*free).sum(), free)) < logits / 4

    monkeypatch.setattr(module, "_LOGITS", 2**16)
    given_ = [t.detach() for t in free]
    out, lse = head_attention_op._init_fn(*given_, 0.25)
    assert peak(lambda: head_attention_op._init_fn(*given_, 0.25)) < logits / 4
    assert peak(lambda: head_attention_backward_op._init_fn(out, *given_, out, lse, 0.25)) < logits / 4


def test_export_and_compile() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
            return ops.head_attention(q, k, v, gates).sum(2)

    given_ = tuple(operands())
    want = dense(*given_).sum(2)
    torch.testing.assert_close(torch.export.export(Layer(), given_).module()(*given_), want)
    compiled = torch.compile(Layer(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given_), want)


@pytest.mark.parametrize("broken", ["width", "heads", "rank", "gates", "dtype"])
def test_wrong_shapes_are_refused(broken: str) -> None:
    q, k, v, gates = operands()
    wrong = {
        "width": (q[..., :2], k, v, gates),
        "heads": (q, k[:, :, :1], v[:, :, :1], gates),
        "rank": (q[0], k, v, gates),
        "gates": (q, k, v, gates[:, :2]),
        "dtype": (q, k.float(), v, gates),
    }[broken]
    with pytest.raises(InputError, match="head_attention"):
        ops.head_attention(*wrong)


def test_a_second_derivative_is_refused() -> None:
    given_ = [t.requires_grad_() for t in operands()]
    (grad,) = torch.autograd.grad(ops.head_attention(*given_).square().sum(), given_[:1], create_graph=True)
    with pytest.raises(MoefxError, match="second derivative"):
        grad.sum().backward()

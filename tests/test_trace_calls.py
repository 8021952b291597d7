"""What goes into a traced model and comes out of it: every form of inputs, the class of the output."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefx.errors import GuardError
from moefx.graph import trace
from tests.trace_support import call, error
from tests.trace_toy import Forward, Toy, batch

# ---------------------------------------------------------------------------- outputs

Named = collections.namedtuple("Named", "first rest")


@dataclasses.dataclass
class Inner:
    value: Tensor
    label: str = "kept"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    many: list[Inner]
    count: int = 0


def outputs() -> Iterator[tuple[str, Forward]]:
    yield "tensor", lambda m, x: x + 1
    yield "tuple", lambda m, x: (x + 1, None, "text", 3)
    yield "list", lambda m, x: [x + 1, (x * 2,)]
    yield "dict", lambda m, x: {"a": x, "b": {"c": [x * 2, None]}}
    yield "ordered", lambda m, x: collections.OrderedDict(b=x, a=x * 2)
    yield "named tuple", lambda m, x: Named(x, {"k": x * 2})
    yield "dataclass", lambda m, x: Outer(Inner(x), [Inner(x * 2, "other"), Inner(x * 3)], 7)
    yield "in a tuple", lambda m, x: (Inner(x), x)
    yield "size", lambda m, x: (x, x.shape[1])


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in outputs()])
def test_the_class_of_the_output_is_kept(body: Forward) -> None:
    model = Toy(body)
    graph = trace(model, batch((2, 6)))
    for size in ((2, 6), (3, 4)):
        wanted, found = call(model, batch(size)), call(graph, batch(size))
        assert type(found) is type(wanted)
        assert repr(found) == repr(wanted)


# ---------------------------------------------------------------------------- inputs


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, scale: float = 2.0, *rest: Tensor, extra: dict[str, Any] | None = None, **more: Any
    ) -> Tensor:
        y = self.linear(x) * scale
        for part in rest:
            y = y + part
        if extra is not None:
            y = y * extra["a"][1] + extra["b"]["c"]
        return y + more.get("bias", 0)


X, Y = (torch.arange(24.0).reshape(3, 8) / 24, torch.ones(3, 8))
NESTED = {"a": [1, Y * 3], "b": {"c": X}}


@pytest.mark.parametrize(
    "inputs",
    [
        (X,),
        (X, 3.0),
        (X, 3.0, Y, Y * 2),
        {"x": X},
        {"x": X, "scale": 0.5, "bias": Y},
        ((X, 3.0), {"extra": NESTED}),
        {"x": X, "extra": NESTED, "bias": 1.5},
    ],
)
def test_every_form_of_inputs(inputs: Any) -> None:
    model = Inputs()
    graph = trace(model, inputs)
    assert error(call(graph, inputs), call(model, inputs)) == 0


def test_whatever_differs_from_the_captured_call_is_refused() -> None:
    model = Inputs()
    graph = trace(model, {"x": X, "extra": NESTED})
    other = {
        "scale": {"scale": 3.0},
        "True for 1": {"extra": {"a": [True, Y], "b": {"c": X}}},
        "structure": {"extra": {"a": [1, Y], "b": {"d": X}}},
        "length": {"extra": {"a": [1, Y, Y], "b": {"c": X}}},
        "dropped": {"extra": None},
        "number for tensor": {"extra": {"a": [1, 2.0], "b": {"c": X}}},
        "tensor for number": {"scale": torch.tensor(2.0)},
        "dimensions": {"x": X[None]},
        "type": {"x": X.double()},
        "more": {"bias": Y},
        "device": {"x": X.to("meta")},
    }
    for name, change in other.items():
        with pytest.raises(GuardError) as caught:
            graph(**({"x": X, "extra": NESTED} | change))
        assert caught.value.found, name
    with pytest.raises(GuardError, match=r"captured with 2\.0"):
        graph(X, 3.0, extra=NESTED)


def test_a_wrong_width_is_a_guard_error_with_the_users_line() -> None:
    graph = trace(Toy(lambda m, x: m.linear(x)), batch((2, 6)))
    with pytest.raises(GuardError, match=r"test_trace_calls\.py") as caught:
        graph(torch.zeros(2, 6, 9))
    assert "RuntimeError" in caught.value.found


def test_the_callers_tensors_and_containers_are_not_touched() -> None:
    def body(m: Any, x: Tensor) -> Any:
        return x.mul_(0) if x.sum() > -1e9 else x

    x = torch.ones(2, 6, 8)
    trace(Toy(body), (x,))
    assert x.eq(1).all()
    extra = {"a": [1, Y], "b": {"c": X}}

    class Pops(nn.Module):
        def forward(self, x: Tensor, extra: dict[str, Any]) -> Tensor:
            part: Tensor = extra.pop("b")["c"]
            return x + part

    graph = trace(Pops(), {"x": X, "extra": extra})
    assert list(extra) == ["a", "b"]
    assert error(call(graph, {"x": X, "extra": extra}), X + X) == 0


def test_warnings_of_the_model_are_its_own() -> None:
    def body(m: Any, x: Tensor) -> Any:
        warnings.warn("careful", UserWarning, stacklevel=1)
        return x + 1

    with pytest.warns(UserWarning, match="careful"):
        graph = trace(Toy(body), batch((2, 6)))
    assert error(call(graph, batch((2, 6))), batch((2, 6))[0] + 1) == 0

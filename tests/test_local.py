"""Modules captured alone: once each, in both modes only where a forward asks for its own."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx import zoo
from moefx.errors import CaptureError
from moefx.graph import trace
from moefx.model import local
from tests.trace_toy import Toy

INPUTS = {"args": [{"tensor": [2, 8, 8], "dtype": "float32"}], "kwargs": {}}


def captured(monkeypatch: pytest.MonkeyPatch, body: Callable[[Any, Tensor], Tensor]) -> tuple[Toy, int]:
    """Capture a module with this forward alone; return it and how often it was traced."""
    modes = []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        modes.append(module.training)
        return trace(module, *args, **kwargs)

    monkeypatch.setattr(local, "trace", counted)
    model = Toy(body)
    local.local_graph(model, INPUTS, "children")
    return model, len(modes)


def test_a_forward_without_modes_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, count = captured(monkeypatch, lambda m, x: m.linear(x))
    assert count == 1
    assert "training" not in vars(type(model))
    assert "training" not in vars(nn.Module)


@pytest.mark.parametrize(
    "ask", [lambda m: m.training, lambda m: getattr(m, "training", False)], ids=["attribute", "getattr"]
)
def test_a_forward_that_asks_for_its_mode_is_traced_in_both(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[Any], bool]
) -> None:
    model, count = captured(monkeypatch, lambda m, x: (ask(m), m.linear(x))[1])
    assert count == 2
    assert not model.training
    assert "training" not in vars(type(model))


def test_a_forward_that_differs_between_modes_is_refused() -> None:
    model = Toy(lambda m, x: F.dropout(m.linear(x), 0.5, m.training))
    with pytest.raises(CaptureError, match="differs between train and eval mode"):
        local.local_graph(model, INPUTS, "children")
    assert not model.training
    assert "training" not in vars(type(model))


def test_the_mode_of_another_module_of_the_same_class_is_its_own() -> None:
    inner = Toy(lambda m, x: m.linear(x)).eval()

    def body(m: Any, x: Tensor) -> Tensor:
        return m.linear(x) * (2.0 if inner.training else 3.0)

    graph = trace(Toy(body), (torch.ones(2, 8, 8),))
    assert not graph.reads_mode
    assert any(3.0 in node.args for node in graph.nodes)


def test_a_class_with_a_mode_of_its_own_counts_as_asked() -> None:
    class Frozen(Toy):
        training = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]

    assert trace(Frozen(lambda m, x: m.linear(x)), (torch.ones(2, 8, 8),)).reads_mode
    assert isinstance(vars(Frozen)["training"], property)


@pytest.mark.parametrize("recipe", ["moh", "dydit", "mod"])
def test_a_transform_captures_a_module_once_for_what_is_asked(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    capture, asked = local._capture, collections.Counter[tuple[Any, ...]]()

    def counted(module: nn.Module, inputs: Any, leaf: Any, expand: Any) -> Any:
        state = (module.training, getattr(module, "gradient_checkpointing", None))
        asked[(id(module), json.dumps(inputs), leaf, tuple(sorted(expand)), *state)] += 1
        return capture(module, inputs, leaf, expand)

    monkeypatch.setattr(local, "_capture", counted)
    moefx.transform(zoo.tiny("FluxTransformer2DModel"), recipe=recipe)
    assert set(asked.values()) == {1}

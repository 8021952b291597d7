"""Forwards that no graph can stand for: refused with the user's own line, and nothing changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moefx.errors import CaptureError, MoefxError
from moefx.graph import trace
from tests.trace_support import fingerprint
from tests.trace_toy import SIZES, Forward, Toy, batch

REFUSED: dict[str, tuple[Forward, str]] = {}


def refused(message: str) -> Callable[[Forward], Forward]:
    def add(body: Forward) -> Forward:
        REFUSED[body.__name__] = body, message
        return body

    return add


@refused("replace 'count'")
def buffer_replaced(m: Any, x: Tensor) -> Any:
    m.count = m.count + 1
    return x * m.count


@refused("replace 'linear.weight'")
def parameter_replaced(m: Any, x: Tensor) -> Any:
    m.linear.weight = nn.Parameter(torch.zeros(8, 8))
    return m.linear(x)


@refused("replace 'linear'")
def child_replaced(m: Any, x: Tensor) -> Any:
    m.linear = nn.Linear(8, 8)
    return m.linear(x)


@refused("in place")
def parameter_written_while_data_is_read(m: Any, x: Tensor) -> Any:
    if x.sum() > -1e9:
        m.linear.weight.data.mul_(2)
    return m.linear(x)


@refused("in place")
def buffer_added_to_while_data_is_read(m: Any, x: Tensor) -> Any:
    if x.sum() > -1e9:
        m.count += 1
    return x * m.count


@refused("torch.Generator")
def own_generator(m: Any, x: Tensor) -> Any:
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


@refused("Python's random")
def python_random(m: Any, x: Tensor) -> Any:
    return x * random.random()


@refused("numpy.random")
def numpy_random(m: Any, x: Tensor) -> Any:
    return x * float(np.random.rand())


@refused("torch's seed")
def seeding(m: Any, x: Tensor) -> Any:
    torch.manual_seed(3)
    return x + torch.randn(x.shape)


@refused("boom")
def raises(m: Any, x: Tensor) -> Any:
    m.leftover = x * 2
    raise KeyError("boom")


@refused("a Toy")
def returns_an_object(m: Any, x: Tensor) -> Any:
    return {"x": x, "model": m}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_users_own_line_and_nothing_changed(name: str) -> None:
    body, message = REFUSED[name]
    model = Toy(body)
    before = fingerprint(model)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(CaptureError) as caught:
        trace(model, batch(SIZES[0]))
    assert message in caught.value.found
    if name not in ("python_random", "numpy_random", "seeding", "returns_an_object"):
        assert "test_trace_refusals.py:" in caught.value.found
    assert caught.value.do
    assert fingerprint(model) == before
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_errors_are_moefx_errors_with_three_parts() -> None:
    with pytest.raises(MoefxError) as caught:
        trace(Toy(REFUSED["raises"][0]), batch((2, 6)))
    text = str(caught.value)
    assert text.startswith("trace Toy\n  found: KeyError: 'boom' at ")
    assert "\n  do: " in text

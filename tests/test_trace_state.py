"""What outlives one call: state between calls, caches, modes, tied weights, other threads."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import CaptureError, GuardError
from moefx.graph import trace
from moefx.graph.proxy import ScalarProxy, TensorProxy
from tests.test_trace_hazards import CASES
from tests.trace_support import call, error, leaves
from tests.trace_toy import SIZES, Toy, batch


def test_a_counter_in_python_is_guarded() -> None:
    def body(m: Any, x: Tensor) -> Any:
        m.calls = getattr(m, "calls", 0) + 1
        return x * m.calls

    model = Toy(body)
    model.calls = 1
    graph = trace(model, batch(SIZES[0]))
    assert model.calls == 1
    found = call(graph, batch(SIZES[0]))
    assert error(found, call(model, batch(SIZES[0]))) == 0
    with pytest.raises(GuardError, match=r"Toy.calls = 2, captured with 1"):
        call(graph, batch(SIZES[0]))


def test_a_lazily_filled_attribute_is_put_back_and_noted() -> None:
    def body(m: Any, x: Tensor) -> Any:
        if m.positions is None:
            m.positions = torch.arange(x.shape[1]).float()
        return x * m.positions[None, :, None]

    model = Toy(body)
    model.positions = None
    graph = trace(model, batch((2, 6)))
    assert model.positions is None
    assert "Toy.positions" in graph.notes[0]
    assert error(call(graph, batch((3, 6))), call(model, batch((3, 6)))) == 0


@functools.lru_cache
def cached_table(width: int) -> Tensor:
    return torch.arange(width).float()


def _hidden_cache() -> Callable[[int], Tensor]:
    @functools.lru_cache
    def inner(width: int) -> Tensor:
        return torch.arange(width).float() + 1

    return lambda width: inner(width)


class Helper:
    """A function cache and a table that live outside the model's modules."""

    hidden = staticmethod(_hidden_cache())
    tables: ClassVar[dict[int, Tensor]] = {}

    def table(self, width: int) -> Tensor:
        if width not in self.tables:
            self.tables[width] = torch.arange(width).float() * 2
        return self.tables[width]


HELPER = Helper()
GLOBAL: dict[int, Any] = {}


class Cached(Toy):
    """A model of this file, as the tables are."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_no_traced_value_stays_in_a_cache(fails: bool, frozen: bool) -> None:
    gc.freeze() if frozen else gc.unfreeze()

    def body(m: Any, x: Tensor) -> Any:
        if 8 not in GLOBAL:
            GLOBAL[8] = (torch.arange(8).float(), "pair")
        y = x * cached_table(8) + Helper.hidden(8) + GLOBAL[8][0] + HELPER.table(8)
        if fails and type(y) is TensorProxy:
            raise ValueError("late")
        return y

    model = Cached(body)
    try:
        graph = trace(model, batch((2, 6)))
    except CaptureError:
        assert fails
    else:
        assert error(call(graph, batch((3, 6))), call(model, batch((3, 6)))) == 0
    assert type(call(model, batch((3, 6)))) is Tensor
    cached_table.cache_clear()
    GLOBAL.clear()
    HELPER.tables.clear()
    gc.freeze()  # as the suite does


def test_no_proxy_outlives_a_trace() -> None:
    gc.collect()
    before = sum(type(o) is TensorProxy for o in gc.get_objects())
    model = Toy(CASES["in_place"])
    graph = trace(model, batch((2, 6)))
    gc.collect()
    assert sum(type(o) is TensorProxy for o in gc.get_objects()) == before
    assert not any(type(leaf) in (TensorProxy, ScalarProxy) for call_ in graph.calls for leaf in leaves(call_.output))


def test_caches_that_hold_nothing_of_the_trace_are_kept() -> None:
    cached_table.cache_clear()
    cached_table(3)
    trace(Toy(CASES["in_place"]), batch((2, 6)))
    assert cached_table.cache_info().currsize == 1
    cached_table.cache_clear()


# ---------------------------------------------------------------------------- modules


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(6)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(self.first(x))))
        x = F.linear(self.recurrent(x)[0], self.second.weight)
        return x + self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [False, True])
def test_tied_weights_repeated_calls_and_opaque_leaves(training: bool) -> None:
    model = Pair().train(training)
    state = copy.deepcopy(model.state_dict())
    graph = trace(model, batch((2, 6)))
    wanted, after = call(model, batch((4, 6))), copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert error(call(graph, batch((4, 6))), wanted) == 0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in after.items())
    assert graph.parameter("second.weight") is graph.parameter("first.weight") is model.first.weight
    assert [n.meta["moefx_call_index"] for n in graph.fx.nodes if n.target == "first"] == [0, 1]


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy(lambda m, x: F.dropout(m.linear(x), 0.5, m.training))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_the_mode_of_every_traced_module_is_checked() -> None:
    model = Nest().eval()
    graph = trace(model, batch((2, 6)))
    model.inner.train()
    with pytest.raises(GuardError, match="inner is in train mode, the graph was captured in eval mode"):
        graph(*batch((2, 6)))
    model.inner.eval()
    model.train()
    with pytest.raises(GuardError, match="the model is in train mode"):
        graph(*batch((2, 6)))
    model.eval()
    assert error(call(graph, batch((2, 6))), call(model, batch((2, 6)))) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types(dtype: torch.dtype) -> None:
    model = Toy(CASES["in_place"]).to(dtype)
    (x,) = batch((2, 6))
    graph = trace(model, (x.to(dtype),))
    assert error(call(graph, (x.to(dtype),)), call(model, (x.to(dtype),))) == 0
    with pytest.raises(GuardError, match=r"x is torch\.float32"):
        graph(x)


def test_tracing_under_no_grad_still_gives_gradients() -> None:
    model = Toy(CASES["autocast"])
    with torch.no_grad():
        graph = trace(model, batch((2, 6)))
    assert graph(*batch((2, 6))).requires_grad
    model = Toy(CASES["no_grad"])
    x = batch((2, 6))
    graph = trace(model, x)
    one = torch.autograd.grad(model(*x).sum(), model.linear.weight)[0]
    two = torch.autograd.grad(graph(*x).sum(), model.linear.weight)[0]
    assert torch.equal(one, two)
    assert not torch.equal(one, torch.autograd.grad((model.linear(*x) * (1 + x[0])).sum(), model.linear.weight)[0])


def test_autocast_blocks_run_again_in_their_own_precision() -> None:
    model = Toy(CASES["autocast"])
    graph = trace(model, batch((2, 6)))
    linears = [n for n in graph.fx.nodes if n.op == "call_module"]
    assert [n.meta["val"].dtype for n in linears] == [torch.bfloat16, torch.float32]
    plain = Toy(lambda m, x: m.linear(x) * 2)
    plain.load_state_dict(model.state_dict())
    assert error(call(graph, batch((2, 6))), call(model, batch((2, 6)))) == 0
    assert error(call(plain, batch((2, 6))), call(model, batch((2, 6)))) > 1e-4


def test_another_thread_runs_the_model_meanwhile() -> None:
    model = Toy(CASES["in_place"])
    x = batch((2, 6))
    wanted, wrong = call(model, x), []
    started, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            with torch.no_grad():
                found = model(*x)
            started.set()
            if type(found) is not Tensor or not torch.equal(found, wanted):
                wrong.append(found)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        for _ in range(20):
            assert error(call(trace(model, x), x), wanted) == 0
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_a_trace_inside_a_forward_is_independent() -> None:
    other, inner = Toy(CASES["in_place"]), batch((2, 6))
    found: list[Any] = []

    def body(m: Any, x: Tensor) -> Any:
        found.append(trace(other, inner))
        return m.linear(x)

    model = Toy(body)
    graph = trace(model, batch((3, 6)))
    assert error(call(graph, batch((3, 6))), call(model, batch((3, 6)))) == 0
    assert error(call(found[0], batch((3, 6))), call(other, batch((3, 6)))) == 0

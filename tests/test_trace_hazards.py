"""What real forwards do to a tracer: each must be captured exactly, guarded, or refused with the user's own line.

The rule under test: the graph never returns other numbers than the model without raising.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefx.errors import CaptureError, GuardError, MoefxError
from moefx.graph import trace
from moefx.graph.proxy import ScalarProxy, TensorProxy
from tests.trace_support import attempt, call, error, fingerprint, leaves

# Sizes [B, T, 8]: the captured ones first.
SIZES = ((2, 6), (3, 6), (1, 6), (2, 5), (5, 9))
Forward = Callable[[Any, Tensor], Any]


class Toy(nn.Module):
    """One linear layer, two buffers, and whatever forward a test gives it."""

    def __init__(self, body: Forward, train: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.arange(8.0))
        self.body = body
        self.train(train)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def batch(size: tuple[int, int], seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(*size, 8, generator=torch.Generator().manual_seed(seed)),)


CASES: dict[str, Forward] = {}
REFUSED: dict[str, tuple[Forward, str]] = {}


def case(body: Forward) -> Forward:
    CASES[body.__name__] = body
    return body


def refused(message: str) -> Callable[[Forward], Forward]:
    def add(body: Forward) -> Forward:
        REFUSED[body.__name__] = body, message
        return body

    return add


# ---------------------------------------------------------------------------- how many tensors there are


@case
def split_by_size(m: Any, x: Tensor) -> Any:
    return sum((part.sum(0) for part in x.split(2, 0)), torch.zeros(()))


@case
def split_function(m: Any, x: Tensor) -> Any:
    return torch.stack([part.sum() for part in torch.split(x, split_size_or_sections=3, dim=1)])


@case
def unbind(m: Any, x: Tensor) -> Any:
    y = torch.zeros(())
    for row in x.unbind(1):
        y = y + m.linear(row)
    return y


@case
def iteration(m: Any, x: Tensor) -> Any:
    y = torch.zeros(())
    for row in x:
        y = y * 2 + row
    return y


@case
def uneven_chunks(m: Any, x: Tensor) -> Any:
    return torch.stack([part.sum() for part in x.chunk(4, 1)])


@case
def tensor_split(m: Any, x: Tensor) -> Any:
    return torch.stack([part.sum() for part in torch.tensor_split(x, 2, 1)])


@case
def nonzero_tuple(m: Any, x: Tensor) -> Any:
    i, j, k = torch.nonzero(x > 0, as_tuple=True)
    return x.sum() + x[i, j, k].mean()


# ---------------------------------------------------------------------------- sizes in Python


@case
def size_arithmetic(m: Any, x: Tensor) -> Any:
    b, t, d = x.shape
    y = x * (b / 7) + t**0.5 - (b * t // 3 % 5) + x.numel() + len(x.shape) + sum(x.shape)
    return y.reshape(b, -1, d // 2, 2).flatten(1).view(*x.shape[:2], -1)


@case
def size_functions(m: Any, x: Tensor) -> Any:
    t = x.shape[1]
    whole, rest = divmod(t, 4)
    y = x * math.sqrt(t) + math.floor(t / 4) - math.ceil(t / 4) + math.trunc(t / 4) + round(t / 4)
    return y * (whole + 1) + rest + divmod(100, t)[1]


@case
def size_branch(m: Any, x: Tensor) -> Any:
    return x * 2 if x.size(1) > 5 else x * 3


@case
def size_membership(m: Any, x: Tensor) -> Any:
    return x * 2 if x.shape[1] in (4, 6) else x * 3


@case
def size_equality(m: Any, x: Tensor) -> Any:
    return x * 2 if x.shape == (2, 6, 8) else x * 3


@case
def size_extremes(m: Any, x: Tensor) -> Any:
    return x * max(x.shape[0], x.shape[1]) + min(x.shape)


@case
def size_loop(m: Any, x: Tensor) -> Any:
    return torch.stack([x[:, i] * i for i in range(x.shape[1])], 1)


@case
def size_in_text(m: Any, x: Tensor) -> Any:
    return x * len(f"{x.shape[1] ** 2}")


@case
def size_in_numpy(m: Any, x: Tensor) -> Any:
    return x + torch.from_numpy(np.arange(x.shape[1], dtype=np.float32))[None, :, None]


@case
def size_in_tensor(m: Any, x: Tensor) -> Any:
    scale = torch.tensor([x.shape[1]], dtype=x.dtype)
    return x * scale + torch.full((x.shape[0], 1, 1), 2.0) + x.new_full((x.shape[0], 1, 8), x.shape[1])


@case
def size_in_windows(m: Any, x: Tensor) -> Any:
    t = x.shape[1]
    return (
        x
        * (torch.hamming_window(t) + torch.bartlett_window(t) + torch.fft.fftfreq(t) + torch.linspace(0, 1, t))[:, None]
    )


@case
def broadcast_shapes(m: Any, x: Tensor) -> Any:
    return x[:1].expand(torch.broadcast_shapes(x.shape, (1, 1, 8))) * 2


@case
def dtype_and_device(m: Any, x: Tensor) -> Any:
    scale = {torch.float32: 2.0, torch.float64: 3.0}[x.dtype]
    return (
        x * scale * (1 if x.device.type == "cpu" else 3) * (1 if str(x.device) == "cpu" else 5)
        + torch.finfo(x.dtype).eps
    )


# ---------------------------------------------------------------------------- data in Python


@case
def item(m: Any, x: Tensor) -> Any:
    return x[:, : int(x.abs().sum().item()) % 3 + 1]


@case
def mask_any(m: Any, x: Tensor) -> Any:
    return x * 0 if (x > 2.5).any() else x + 1


@case
def mask_index(m: Any, x: Tensor) -> Any:
    return x[x > 0].sum() + x


@case
def to_list(m: Any, x: Tensor) -> Any:
    return x * sum((x[0, 0] > 0).tolist())


@case
def equality(m: Any, x: Tensor) -> Any:
    return x * 2 if torch.equal(x, x.relu()) else x


@case
def assertion(m: Any, x: Tensor) -> Any:
    assert torch.isfinite(x).all()
    return x + 1


@case
def contiguity(m: Any, x: Tensor) -> Any:
    return x * 2 if x.is_contiguous() else x * 3


# ---------------------------------------------------------------------------- writing in place


@case
def in_place(m: Any, x: Tensor) -> Any:
    h = m.linear(x)
    h += x
    h.mul_(2)
    h[:, 0] = 0
    h[..., 1:3] *= 3
    F.relu_(h)
    return torch.sub(h, 1, out=torch.empty_like(h))


@case
def in_place_input(m: Any, x: Tensor) -> Any:
    return x.mul_(3).add_(1)


@case
def data_write(m: Any, x: Tensor) -> Any:
    y = torch.zeros(1, x.shape[1], 8)
    y.data[:, :2].copy_(x[:1, :2])
    return x + y


@case
def reshaping_in_place(m: Any, x: Tensor) -> Any:
    y = x.clone()
    before = y.shape[0]
    y.unsqueeze_(0)
    y.transpose_(0, 2)
    return y.reshape(y.shape[0], -1) * y.shape[1] * y.dim() + before


@case
def buffer_in_place(m: Any, x: Tensor) -> Any:
    m.count.add_(1)
    m.count += 2
    return x * m.count


# ---------------------------------------------------------------------------- contexts, randomness


@case
def no_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = m.linear(x)
    return y + m.linear(x) * x


@case
def autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = m.linear(x)
    return y.float() + z


@case
def dropout(m: Any, x: Tensor) -> Any:
    return F.dropout(m.linear(x), 0.5, m.training) + torch.where(torch.rand(x.shape) < 0.5, x, 0)


@case
def activation_checkpoint(m: Any, x: Tensor) -> Any:
    return checkpoint(lambda y: m.linear(y).relu(), x, use_reentrant=False)


@case
def exception_caught(m: Any, x: Tensor) -> Any:
    try:
        return x * int("not a number")
    except ValueError:
        return x + 1


@case
def parameters_in_a_loop(m: Any, x: Tensor) -> Any:
    return x + sum((p.sum() for p in m.parameters()), torch.zeros(()))


@case
def complex_numbers(m: Any, x: Tensor) -> Any:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones(4), torch.arange(4.0))).flatten(2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equal_or_guarded(name: str, training: bool) -> None:
    model = Toy(CASES[name], training)
    before, random_state = fingerprint(model), torch.get_rng_state()
    graph = trace(model, batch(SIZES[0]))
    assert fingerprint(model) == before
    assert torch.equal(random_state, torch.get_rng_state())
    state = copy.deepcopy(model.state_dict())
    ran = 0
    for seed, size in enumerate(SIZES):
        wanted = call(model, copy.deepcopy(batch(size, seed)))
        written = copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        found = attempt(graph, copy.deepcopy(batch(size, seed)))
        if isinstance(found, GuardError):
            continue
        ran += 1
        assert error(found, wanted) == 0, size
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in written.items()), size
        model.load_state_dict(state)
    assert ran or graph.guards


@pytest.mark.parametrize("name", ["size_arithmetic", "size_in_tensor", "in_place", "autocast", "mask_index", "dropout"])
def test_general_forwards_have_no_guards(name: str) -> None:
    assert trace(Toy(CASES[name]), batch(SIZES[0])).guards == []


@pytest.mark.parametrize(
    ("name", "size", "line"),
    [
        ("split_by_size", (3, 6), "x.split(2, 0)"),
        ("unbind", (2, 5), "x.unbind(1)"),
        ("iteration", (3, 6), "for row in x:"),
        ("uneven_chunks", (2, 7), "x.chunk(4, 1)"),
        ("size_branch", (2, 5), "x.size(1) > 5"),
        ("size_in_text", (2, 15), "x.shape[1] ** 2"),
        ("size_loop", (2, 5), "range(x.shape[1])"),
    ],
)
def test_a_guard_names_the_line_that_read_the_size(name: str, size: tuple[int, int], line: str) -> None:
    graph = trace(Toy(CASES[name]), batch(SIZES[0]))
    assert graph.guards
    assert all("==" in guard.describe() for guard in graph.guards)
    with pytest.raises(GuardError) as caught:
        graph(*batch(size))
    assert "test_trace_hazards.py" in caught.value.found
    assert line in caught.value.found


def test_no_guard_for_splits_that_no_size_changes() -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.linear(x)
        a, b = h.split(4, -1)
        c, d = h.unflatten(-1, (2, 4)).unbind(-2)
        q, k = h.reshape(*x.shape[:2], 2, 4).permute(2, 0, 1, 3).unbind(0)
        e, f = h.chunk(2, dim=-1)
        g, i = x.split([3, 5], -1)
        return a + b + c + d + q + k + e + f + g.sum() + i.sum()

    model = Toy(body)
    graph = trace(model, batch((2, 6)))
    assert graph.guards == []
    assert error(call(graph, batch((5, 9))), call(model, batch((5, 9)))) == 0


# ---------------------------------------------------------------------------- refusals


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
        assert "test_trace_hazards.py:" in caught.value.found
    assert caught.value.do
    assert fingerprint(model) == before
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_data_dependent_forward_is_refused_on_meta() -> None:
    model = Toy(CASES["mask_any"]).to("meta")
    with pytest.raises(CaptureError, match="depends on data") as caught:
        trace(model, batch(SIZES[0]))
    assert "(x > 2.5).any()" in caught.value.found


# ---------------------------------------------------------------------------- state between calls


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


@pytest.mark.parametrize("fails", [False, True])
def test_no_traced_value_stays_in_a_cache(fails: bool) -> None:
    def body(m: Any, x: Tensor) -> Any:
        if 8 not in GLOBAL:
            GLOBAL[8] = (torch.arange(8).float(), "pair")
        y = x * cached_table(8) + Helper.hidden(8) + GLOBAL[8][0] + HELPER.table(8)
        if fails and type(y) is TensorProxy:
            raise ValueError("late")
        return y

    model = Toy(body)
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
    with pytest.raises(GuardError, match=r"test_trace_hazards\.py") as caught:
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


def test_errors_are_moefx_errors_with_three_parts() -> None:
    with pytest.raises(MoefxError) as caught:
        trace(Toy(REFUSED["raises"][0]), batch((2, 6)))
    text = str(caught.value)
    assert text.startswith("trace Toy\n  found: KeyError: 'boom' at ")
    assert "\n  do: " in text

"""What real forwards do to a tracer: each must be captured exactly, guarded, or refused with the user's own line.

The rule under test: the graph never returns other numbers than the model without raising.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moefx.errors import CaptureError, GuardError
from moefx.graph import trace
from tests.trace_support import attempt, call, error, fingerprint
from tests.trace_toy import SIZES, Forward, Toy, batch

CASES: dict[str, Forward] = {}


def case(body: Forward) -> Forward:
    CASES[body.__name__] = body
    return body


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


def test_data_dependent_forward_is_refused_on_meta() -> None:
    model = Toy(CASES["mask_any"]).to("meta")
    with pytest.raises(CaptureError, match="depends on data") as caught:
        trace(model, batch(SIZES[0]))
    assert "(x > 2.5).any()" in caught.value.found

"""Offloaded models give the bits of resident ones; the cache obeys its budget, its schedule and its closed forms."""

import copy
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from moefx import zoo
from moefx.errors import InputError, MoefxError, NothingMatched, OptionError, PlanError
from moefx.graph.inputs import synthesise
from moefx.offloading import OffloadedExperts, offload, offload_stats, onload
from moefx.offloading.layout import Layout
from moefx.offloading.pins import choose_pins
from moefx.offloading.store import FileStore
from moefx.passes.placement import RoutingTrace
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights
from moefx.routing.slices import OffsetExperts

LAYERS, EXPERTS, WIDTH, HIDDEN = 3, 6, 16, 24


class Net(nn.Module):
    """Routed FFNs with residuals; ``order`` is the order in which they run."""

    def __init__(self, dtype: torch.dtype, *, gated: bool = False, bias: bool = True, order: str = "012") -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        act = (lambda up, gate: up * nn.functional.silu(gate)) if gated else nn.functional.gelu
        self.ffns = nn.ModuleList()
        for _ in range(LAYERS):
            weights = random_weights(WIDTH, HIDDEN, num_experts=EXPERTS, gated=gated, bias=bias, generator=draws)
            router = LinearRouter(WIDTH, EXPERTS, std=0.5, generator=draws)
            self.ffns.append(RoutedFFN(router, Experts(weights, act), top_k=2))
        self.order = [int(i) for i in order]
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            x = x + self.ffns[i](x)
        return x


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Return the bytes of the model, of its streamable weights, and of one expert with what aligns it."""
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    stacked = sum(p.nbytes for e in experts for n, p in e.named_parameters(recurse=False) if n != "b_out")
    total = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return total, stacked, max(Layout.of(e).nbytes for e in experts)


def budget_for(model: nn.Module, pinned: int, staging: int = 8) -> int:
    total, stacked, one = sizes(model)
    slot = max(Layout.of(m).largest for m in model.modules() if isinstance(m, Experts))
    return total - stacked + staging * slot + pinned * one


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("policy", ["schedule", "lru"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False)])
def test_results_are_those_of_the_resident_model_to_the_bit(
    policy: str, dtype: torch.dtype, gated: bool, bias: bool
) -> None:
    model = Net(dtype, gated=gated, bias=bias).eval()
    inputs = [torch.randn(1, tokens, WIDTH, dtype=dtype) for tokens in (1, 3, 257, 0)]
    wanted = [model(x) for x in inputs]
    offload(model, budget_for(model, pinned=7), policy=policy)
    for _ in range(2):
        for x, expected in zip(inputs, wanted, strict=True):
            assert torch.equal(model(x), expected)
    assert offload_stats(model).read_bytes > 0
    onload(model)
    assert torch.equal(model(inputs[2]), wanted[2])


def test_experts_behind_others_are_streamed_too() -> None:
    """Slices with constants for those left out: their stack lies behind another module."""
    model = Net(torch.float32).eval()
    for ffn in model.ffns:
        ffn.experts = OffsetExperts(ffn.experts, torch.randn(EXPERTS, WIDTH))  # type: ignore[arg-type]
    x, names = torch.randn(1, 40, WIDTH), set(model.state_dict())
    wanted = model(x)
    offload(model, budget_for(model, pinned=4))
    assert torch.equal(model(x), wanted)
    assert offload_stats(model).read_bytes > 0
    assert set(model.state_dict()) == names
    assert torch.equal(onload(model)(x), wanted)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "FluxTransformer2DModel"])
def test_a_denoiser_is_equal_can_be_saved_and_comes_back(name: str, tmp_path: Path) -> None:
    model = moefx.transform(zoo.tiny(name), experts=4, top_k=2, noise=0.1).eval()
    inputs = synthesise(model)
    wanted = model(**inputs, return_dict=False)[0]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    offload(model, budget_for(model, pinned=2, staging=2), staging=2, folder=tmp_path)
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted)
    during = model.state_dict()
    assert during.keys() == before.keys()
    assert all(torch.equal(during[key], before[key]) for key in before)
    moefx.save(model, tmp_path / "saved")
    assert torch.equal(moefx.load(tmp_path / "saved")(**inputs, return_dict=False)[0], wanted)
    onload(model)
    assert {key: id(p) for key, p in model.named_parameters()} == {key: id(p) for key, p in parameters.items()}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(**inputs, return_dict=False)[0], wanted)


def test_an_order_other_than_the_models_is_learnt() -> None:
    model, x = Net(torch.float32, order="201").eval(), torch.randn(1, 300, WIDTH)
    wanted = model(x)
    offload(model, budget_for(model, pinned=0, staging=2), staging=2)
    for _ in range(3):
        assert torch.equal(model(x), wanted)
    engine = next(m for m in model.modules() if isinstance(m, OffloadedExperts))._stream
    assert engine._following == {2: 0, 0: 1, 1: 2}  # type: ignore[attr-defined]


def test_hit_rates_are_the_pinned_fraction_and_zero_for_a_cache() -> None:
    """All experts of all layers once per step: the closed forms for cyclic accesses."""
    x, total = torch.randn(1, 400, WIDTH), LAYERS * EXPERTS
    for pinned in (2, 6, 12):
        model = offload(Net(torch.float32).eval(), budget_for(Net(torch.float32), pinned))
        cached = offload(Net(torch.float32).eval(), budget_for(Net(torch.float32), pinned), policy="lru")
        for _ in range(4):
            model(x)
            cached(x)
        assert offload_stats(model).accesses == offload_stats(cached).accesses == 4 * 2 * total
        assert offload_stats(model).hit_rate == pytest.approx(pinned / total)
        assert offload_stats(cached).hit_rate == 0.0
        assert offload_stats(cached).read_bytes == 4 * sizes(Net(torch.float32))[1]


def test_with_a_pause_between_layers_everything_is_loaded_ahead() -> None:
    model, x = Net(torch.float32).eval(), torch.randn(1, 400, WIDTH)
    for ffn in model.ffns:
        ffn.router.register_forward_hook(lambda *_: time.sleep(0.05))
    offload(model, budget_for(model, pinned=12, staging=4), staging=4)
    model(x)
    stats = offload_stats(model)
    before = stats.late
    model(x)
    assert stats.late == before, stats  # two streamed experts per layer are four halves, for four slots
    assert stats.ahead >= 12


def test_device_memory_is_within_the_budget() -> None:
    model = Net(torch.float32).eval()
    limit = budget_for(model, pinned=5)
    offload(model, limit)
    layers = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
    slots = layers[0]._stream._slots.all  # type: ignore[attr-defined]
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(t.nbytes for layer in layers for half in layer._pinned.values() for t in half.values())
    held += sum(s.buffer.nbytes for s in slots)
    assert limit - 2 * sizes(Net(torch.float32))[2] < held <= limit
    assert sum(len(layer.pins) for layer in layers) == 5


def test_everything_stays_where_everything_fits() -> None:
    model, x = Net(torch.float32).eval(), torch.randn(1, 64, WIDTH)
    wanted = model(x)
    offload(model, "1GB")
    assert torch.equal(model(x), wanted)
    assert offload_stats(model).hit_rate == 1.0
    assert offload_stats(model).read_bytes == 0


def test_a_trace_decides_what_stays() -> None:
    names = tuple(f"ffns.{i}" for i in range(LAYERS))
    load = np.zeros((4, LAYERS, EXPERTS))
    load[:, 0, 4] = load[:, 1, 1] = load[:, 1, 5] = 3.0  # used at all four levels
    load[:2, 2, :] = 100.0  # more rows, but at two levels only
    trace = RoutingTrace(np.array([0.9, 0.6, 0.4, 0.1]), names, (EXPERTS,) * LAYERS, load)
    model = offload(Net(torch.float32), budget_for(Net(torch.float32), pinned=4), trace=trace)
    pins = [m.pins for m in model.modules() if isinstance(m, OffloadedExperts)]
    assert pins == [(4,), (1, 5), (0,)]


@settings(max_examples=40, deadline=None)
@given(
    experts=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    unit=st.integers(1, 50),
    room=st.integers(0, 900),
    seed=st.integers(0, 99),
)
def test_pins_save_as_many_loads_as_any_choice_when_experts_are_equal(
    experts: list[int], unit: int, room: int, seed: int
) -> None:
    draws = np.random.default_rng(seed)
    load = draws.integers(0, 2, (5, len(experts), max(experts))).astype(float)
    for layer, count in enumerate(experts):
        load[:, layer, count:] = 0
    names = tuple(map(str, range(len(experts))))
    trace = RoutingTrace(np.linspace(1, 0.1, 5), names, tuple(experts), load)
    pins = choose_pins(experts, [unit] * len(experts), room, trace)
    uses = sorted(((load[:, i, e] > 0).sum() for i, n in enumerate(experts) for e in range(n)), reverse=True)
    saved = sum((load[:, i, e] > 0).sum() for i, kept in enumerate(pins) for e in kept)
    assert saved == sum(uses[: room // unit])
    assert sum(map(len, pins)) == min(room // unit, sum(experts))


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_budget_that_is_too_small_says_by_how_much_and_which_would_do() -> None:
    model = Net(torch.float32)
    needed = budget_for(model, pinned=0)
    with pytest.raises(PlanError, match=rf"short by 10 bytes[\s\S]*at least {needed:,} bytes"):
        offload(model, needed - 10)
    assert not any(isinstance(m, OffloadedExperts) for m in model.modules())
    offload(model, needed)


def test_other_refusals_leave_the_model_whole(tmp_path: Path) -> None:
    model = Net(torch.float32)
    enough = budget_for(model, 1)
    shared = Net(torch.float32)
    shared.ffns[1].experts = shared.ffns[0].experts
    other = RoutingTrace(np.ones(1), ("a",), (2,), np.ones((1, 1, 2)))
    cases: list[tuple[type[MoefxError], str, Any]] = [
        (OptionError, "no size", lambda: offload(model, "six")),
        (OptionError, "policy", lambda: offload(model, enough, policy="belady")),
        (OptionError, "at least 2", lambda: offload(model, enough, staging=1)),
        (InputError, "no such folder", lambda: offload(model, enough, folder=tmp_path / "none")),
        (InputError, "device", lambda: offload(model, enough, device="nowhere")),
        (PlanError, "a trace of 1 layers", lambda: offload(model, enough, trace=other)),
        (PlanError, "share their experts", lambda: offload(shared, enough)),
        (NothingMatched, "no routed FFN", lambda: offload(nn.Linear(2, 2), enough)),
        (InputError, "a str", lambda: offload("model", enough)),  # type: ignore[type-var]
        (PlanError, "no offloaded experts", lambda: onload(model)),
        (PlanError, "no offloaded experts", lambda: offload_stats(model)),
    ]
    for kind, says, call in cases:
        with pytest.raises(kind, match=says):
            call()
    assert all(type(ffn.experts) is Experts for ffn in model.ffns)
    assert not list(tmp_path.iterdir())


def test_an_offloaded_model_refuses_what_would_go_wrong_silently() -> None:
    model = Net(torch.float32)
    enough = budget_for(model, 1)
    offload(model, enough)
    with pytest.raises(PlanError, match="offloaded already"):
        offload(model, enough)
    with pytest.raises(PlanError, match="convert it"):
        model.half()
    with pytest.raises(PlanError, match="onload"):
        copy.deepcopy(model)
    with pytest.raises(PlanError, match="onload"):
        model.load_state_dict(model.state_dict())
    with torch.enable_grad(), pytest.raises(PlanError, match="inference"):
        model(torch.randn(1, 4, WIDTH))
    model.to(torch.float32)


def test_a_failing_load_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(torch.float32).eval()
    offload(model, budget_for(model, 0))

    def fails(*_: object) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr(FileStore, "read", fails)
    with pytest.raises(MoefxError, match="the disk is gone"):
        model(torch.randn(1, 64, WIDTH))


def test_thread_and_files_go_with_the_model(tmp_path: Path) -> None:
    model = Net(torch.float32).eval()
    offload(model, budget_for(model, 1), folder=tmp_path)
    model(torch.randn(1, 64, WIDTH))
    assert len(list(tmp_path.glob("*/layer-*.safetensors"))) == LAYERS
    threads = [t for t in threading.enumerate() if t.name == "moefx-offload" and t.is_alive()]
    assert threads
    mine = next(m for m in model.modules() if isinstance(m, OffloadedExperts))._stream._thread  # type: ignore[attr-defined]
    del model
    gc.collect()
    mine.join(timeout=5)
    assert not mine.is_alive()
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_the_example_dit_runs_from_the_public_name() -> None:
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2]))
    model = moefx.transform(DiT(depth=2, width=16).eval(), inputs, experts=4, top_k=2, noise=0.1)
    wanted = model(*inputs)
    moefx.offload(model, budget_for(model, 1))
    assert torch.equal(model(*inputs), wanted)
    moefx.onload(model)
    moefx.untransform(model)

"""A device's choice among schedules, with a stopwatch that needs no device."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch.nn.functional as F

from moefx.codegen import CombineSpec, RegionSpec, Schedule, choose, target, trace_pointwise, tune
from moefx.codegen.kernels import HeadAttentionSpec, InputGradSpec, WeightGradSpec
from moefx.codegen.tune import ShapeClass, Timer, decide
from tests.codegen_support import down_projection, needs_triton, up_projection

SM_90 = target("sm_90")
SHAPE = ShapeClass(up_projection(), SM_90, "a device", 1024, 8, 128)
GELU = trace_pointwise(F.gelu, 4608)
#: One class of every kernel that is timed.
CLASSES = {
    "projection": SHAPE,
    "few rows": ShapeClass(up_projection(), SM_90, "a device", 4, 8, 16),
    "input gradient": ShapeClass(
        InputGradSpec(4608, 1152, "bfloat16", combined=True, bias=True, top_k=2, before=GELU), SM_90, "d", 1024, 8, 128
    ),
    "weight gradient": ShapeClass(WeightGradSpec(1152, 4608, "bfloat16", gather=True), SM_90, "d", 1024, 8, 128),
} | {
    f"heads, {stage}": ShapeClass(HeadAttentionSpec(128, 24, "bfloat16", stage), SM_90, "d", 4096, 32, 128)
    for stage in ("forward", "queries", "keys")
}


class Stopwatch(Timer):
    """Give each schedule of a class a time, or refuse it; remember what was asked."""

    def __init__(self, fastest: int = 0, broken: tuple[int, ...] = (), shape: ShapeClass = SHAPE) -> None:
        candidates = shape.candidates()
        self.fastest, self.broken = candidates[fastest], [candidates[i] for i in broken]
        self.asked: list[Schedule] = []

    def prune(self, schedules: Sequence[Schedule], seconds: float) -> dict[Schedule, str | None]:
        return {}

    def __call__(self, schedule: Schedule) -> float:
        self.asked.append(schedule)
        if schedule in self.broken:
            raise RuntimeError("PassManager::run failed")
        return 1.0 if schedule == self.fastest else 2.0 + len(self.asked)


class SlowCompiler(Stopwatch):
    """A clock of its own that compiling and timing advance, one schedule after the other."""

    def __init__(self, shape: ShapeClass, compile_s: float, now: list[float]) -> None:
        super().__init__(fastest=1, shape=shape)
        self.compile_s, self.now, self.compiled = compile_s, now, 0

    def prune(self, schedules: Sequence[Schedule], seconds: float) -> dict[Schedule, str | None]:
        end = self.now[0] + seconds
        self.compiled = min(len(schedules), int(seconds / self.compile_s))
        self.now[0] = min(end, self.now[0] + len(schedules) * self.compile_s)
        return dict.fromkeys(schedules[self.compiled :])

    def __call__(self, schedule: Schedule) -> float:
        self.now[0] += 0.1
        return super().__call__(schedule)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    tune.clear()
    yield
    tune.clear()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_fastest_wins_and_is_timed_once_per_class(name: str) -> None:
    shape = CLASSES[name]
    assert 2 <= len(shape.candidates()) <= 5
    assert shape.candidates()[0] == shape.preferred
    watch = Stopwatch(fastest=1, shape=shape)
    assert decide(shape, lambda: watch) == watch.fastest
    assert watch.asked == list(shape.candidates())
    assert decide(shape, lambda: watch) == watch.fastest
    tune.clear()  # as in another process
    assert decide(shape, lambda: watch) == watch.fastest
    assert len(watch.asked) == len(shape.candidates())


def test_a_first_call_is_bounded_and_later_processes_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve classes whose schedules take four seconds each to compile: four minutes, if nothing stopped them."""
    now = [0.0]
    monkeypatch.setattr(tune, "_clock", lambda: now[0])
    classes = [replace(SHAPE, load=load, experts=experts) for load in (64, 256, 1024) for experts in (8, 16, 32, 64)]
    chosen = [decide(shape, lambda shape=shape: SlowCompiler(shape, 4.0, now)) for shape in classes]
    assert now[0] <= tune.DEFAULT_BUDGET_S + 0.5, "a process spends its budget and no more"
    assert all(one in shape.candidates() for one, shape in zip(chosen, classes, strict=True))
    assert chosen[0] == classes[0].candidates()[1], "what was ready in time is compared"
    assert not any(shape.path.exists() for shape in classes), "but not kept, since not all of it was"
    monkeypatch.setenv("MOEFX_AUTOTUNE_SECONDS", "60")
    for _ in range(6):
        tune.clear()
        for shape in classes:
            decide(shape, lambda shape=shape: SlowCompiler(shape, 4.0, now))
    assert all(shape.path.exists() for shape in classes)
    tune.clear()
    start = now[0]
    for shape in classes:
        decide(shape, lambda: pytest.fail("timed"))
    assert now[0] == start, "with a warm cache nothing is compiled or timed"


def test_without_time_the_model_chooses_among_what_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Stopwatch):
        def prune(self, schedules: Sequence[Schedule], seconds: float) -> dict[Schedule, str | None]:
            return {schedules[0]: "spills", **dict.fromkeys(schedules[1:])}

    assert decide(SHAPE, lambda: Late()) == SHAPE.candidates()[1]
    assert not SHAPE.path.exists()


def test_what_fails_is_pruned_and_the_reason_kept() -> None:
    watch = Stopwatch(fastest=0, broken=(0, 1))
    found = decide(SHAPE, lambda: watch)
    assert found not in watch.broken
    entry = json.loads(SHAPE.path.read_text())
    assert len(entry["pruned"]) == 2
    assert "PassManager" in next(iter(entry["pruned"].values()))
    assert entry["schedule"] == dataclasses.asdict(found)


def test_if_all_fail_the_model_chooses_and_nothing_is_kept() -> None:
    watch = Stopwatch(broken=tuple(range(len(SHAPE.candidates()))))
    assert decide(SHAPE, lambda: watch) == choose(SHAPE.spec, SHAPE.target, 1024, 8, 128)
    assert not SHAPE.path.exists()


def test_without_memory_the_model_chooses_and_nothing_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> Stopwatch:
        raise MemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class Tight(Stopwatch):
        def __call__(self, schedule: Schedule) -> float:
            if schedule == SHAPE.candidates()[0]:
                raise MemoryError
            return super().__call__(schedule)

    assert decide(SHAPE, full) == SHAPE.preferred
    assert "no room beside the model" in caplog.text
    tune.clear()
    watch = Tight(fastest=2)
    assert decide(SHAPE, lambda: watch) == watch.fastest
    assert not SHAPE.path.exists(), "what had no room may have it another time"


def test_a_damaged_file_is_timed_again_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    watch = Stopwatch(fastest=1)
    decide(SHAPE, lambda: watch)
    for damage in ("{", json.dumps({"class": SHAPE.text, "schedule": {"tile": 3}})):
        SHAPE.path.write_text(damage)
        tune.clear()
        assert decide(SHAPE, lambda: watch) == watch.fastest
    assert caplog.text.count("timed again") == 2


def test_a_file_of_another_class_is_not_trusted() -> None:
    watch = Stopwatch(fastest=1)
    decide(SHAPE, lambda: watch)
    entry = json.loads(SHAPE.path.read_text())
    SHAPE.path.write_text(json.dumps(entry | {"class": "another"}))
    tune.clear()
    asked = len(watch.asked)
    decide(SHAPE, lambda: watch)
    assert len(watch.asked) > asked


def test_classes_differ_by_device_and_load_but_not_by_tokens() -> None:
    for change in ({"device": "b"}, {"load": 512}, {"experts": 16}, {"target": target("sm_100")}, {"block_m": 64}):
        assert replace(SHAPE, **change).text != SHAPE.text  # type: ignore[arg-type]
    assert replace(SHAPE, experts=7).text == SHAPE.text


def test_nothing_is_timed_while_a_graph_is_captured_or_past_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model = choose(SHAPE.spec, SHAPE.target, 1024, 8, 128)
    assert decide(SHAPE, lambda: pytest.fail("timed"), may_time=False) == model
    monkeypatch.setenv("MOEFX_AUTOTUNE_SECONDS", "0")
    assert decide(SHAPE, lambda: pytest.fail("timed")) == model
    monkeypatch.delenv("MOEFX_AUTOTUNE_SECONDS")
    watch = Stopwatch(fastest=2)
    assert decide(SHAPE, lambda: watch) == watch.fastest, "neither was remembered as a choice"
    assert tune.spent_s() > 0


def test_autotuning_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_device_of", lambda _: "a device of the target")
    monkeypatch.setattr(tune, "_name_of", str)
    monkeypatch.setattr(tune, "decide", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setenv("MOEFX_AUTOTUNE", "0")
    found = tune.schedule_for(SHAPE.spec, SHAPE.target, 1024, 8, 128)
    assert found == choose(SHAPE.spec, SHAPE.target, 1024, 8, 128)


@needs_triton
@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_and_heads_are_decided_like_projections(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefx.codegen import attention, backward, runtime

    timed: dict[str, Stopwatch] = {}

    def watch(shape: ShapeClass, device: object) -> Stopwatch:
        return timed.setdefault(shape.spec.name, Stopwatch(fastest=1, shape=shape))

    monkeypatch.setattr(tune, "_device_of", lambda _: "a device of the target")
    monkeypatch.setattr(tune, "_name_of", str)
    monkeypatch.setattr(tune, "_is_capturing", lambda: False)
    monkeypatch.setattr(tune, "DeviceTimer", watch)
    monkeypatch.setenv("MOEFX_AUTOTUNE", str(int(enabled)))
    region = RegionSpec((up_projection(), down_projection()), CombineSpec(1152, 2, "bfloat16"))
    loaded = backward.LoadedBackward(region, SM_90, 1024, 8)
    kernels = [*loaded.input_grads, *loaded.weight_grads]
    kernels += [attention._loaded(spec, SM_90, 4096, 24) for spec in attention.specs(128, 24, "bfloat16", "ieee")]
    runtime.clear()
    attention.clear()
    if not enabled:
        assert not timed
        assert all(k.schedule == k.spec.schedule(SM_90, 4096, 128) for k in kernels[4:])
        return
    assert {kernel.spec.name for kernel in kernels} == set(timed), "and kernels without a choice are not timed"
    assert all(kernel.schedule == timed[kernel.spec.name].fastest for kernel in kernels)
    assert loaded.gate_grad is not None


def test_without_a_device_of_the_target_the_model_chooses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moefx.codegen.tune")
    for name in ("sm_80", "gfx942", "interpreter"):
        found = tune.schedule_for(SHAPE.spec, target(name), 1024, 8, 128)
        assert found == choose(SHAPE.spec, target(name), 1024, 8, 128)
    assert "timed" not in caplog.text

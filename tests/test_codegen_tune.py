"""A device's choice among schedules, with a stopwatch that needs no device."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moefx.codegen import Schedule, choose, target, tune
from moefx.codegen.tune import ShapeClass, decide
from tests.codegen_support import up_projection

SHAPE = ShapeClass(up_projection(), target("sm_90"), "a device", 1024, 8, 128)


class Stopwatch:
    """Give each schedule a time, or refuse it; remember what was asked."""

    def __init__(self, fastest: int = 0, broken: tuple[int, ...] = ()) -> None:
        self.fastest, self.broken = SHAPE.candidates()[fastest], [SHAPE.candidates()[i] for i in broken]
        self.asked: list[Schedule] = []

    def __call__(self, schedule: Schedule) -> float:
        self.asked.append(schedule)
        if schedule in self.broken:
            raise RuntimeError("PassManager::run failed")
        return 1.0 if schedule == self.fastest else 2.0 + len(self.asked)


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    tune.clear()
    yield
    tune.clear()


def test_the_fastest_wins_and_is_timed_once_per_class() -> None:
    watch = Stopwatch(fastest=2)
    assert decide(SHAPE, lambda: watch) == watch.fastest
    assert watch.asked == list(SHAPE.candidates())
    assert decide(SHAPE, lambda: watch) == watch.fastest
    tune.clear()  # as in another process
    assert decide(SHAPE, lambda: watch) == watch.fastest
    assert len(watch.asked) == len(SHAPE.candidates())


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
        assert dataclasses.replace(SHAPE, **change).text != SHAPE.text  # type: ignore[arg-type]
    assert dataclasses.replace(SHAPE, experts=7).text == SHAPE.text


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
    monkeypatch.setattr(tune, "decide", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setenv("MOEFX_AUTOTUNE", "0")
    found = tune.schedule_for(SHAPE.spec, SHAPE.target, 1024, 8, 128)
    assert found == choose(SHAPE.spec, SHAPE.target, 1024, 8, 128)


def test_without_a_device_of_the_target_the_model_chooses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moefx.codegen.tune")
    for name in ("sm_80", "gfx942", "interpreter"):
        found = tune.schedule_for(SHAPE.spec, target(name), 1024, 8, 128)
        assert found == choose(SHAPE.spec, target(name), 1024, 8, 128)
    assert "timed" not in caplog.text

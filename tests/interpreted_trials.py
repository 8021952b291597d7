"""What a device would be asked to try, tried in Triton's interpreter; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moefx.codegen import LinearSpec, Schedule, store, target, trace_pointwise
from moefx.codegen.kernels import HeadAttentionSpec, InputGradSpec, PointGradSpec, WeightGradSpec
from moefx.codegen.spec import Kernel
from moefx.codegen.trials import trial_of
from moefx.codegen.tune import DeviceTimer, ShapeClass
from tests.interpreted_kernels import _poisoned_memory, swiglu  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

GELU, GATED = trace_pointwise(F.gelu, 37), trace_pointwise(swiglu, 74)
SPECS: dict[str, LinearSpec | Kernel] = {
    "up": LinearSpec(24, 37, "float32", True, True, 2, GATED, keep=True),
    "down": LinearSpec(37, 24, "float32", True),
    "input gradient": InputGradSpec(37, 24, "float32", weights=2),
    "input gradient, combined": InputGradSpec(24, 37, "float32", combined=True, bias=True, top_k=2, before=GELU),
    "input gradient, gated": InputGradSpec(24, 37, "float32", before=GATED),
    "weight gradient": WeightGradSpec(37, 24, "float32", gather=True, top_k=2),
    "weight gradient, combined": WeightGradSpec(24, 37, "float32", combined=True, bias=True, top_k=2),
    **{f"heads, {stage}": HeadAttentionSpec(24, 2, "float32", stage) for stage in ("forward", "queries", "keys")},
}


def class_of(spec: LinearSpec | Kernel) -> ShapeClass:
    return ShapeClass(spec, target("interpreter"), "cpu", 6, 3, 16)


def one_second(call: Callable[[], Any]) -> float:
    return 1.0


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_trial_accepts_the_kernel_and_refuses_another_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = class_of(SPECS[name])
    timer = DeviceTimer(shape, torch.device("cpu"), one_second)
    assert timer(shape.preferred) == 1.0
    assert timer.trial.error() < 1e-5
    load = store.load

    def spoilt(source: str, stem: str) -> Any:
        launch = load(source, stem).launch

        def run(*arguments: Any) -> None:
            launch(*arguments)
            found, _ = next(timer.trial.pairs())
            found.mul_(1.1)

        return SimpleNamespace(launch=run)

    monkeypatch.setattr(store, "load", spoilt)
    with pytest.raises(ArithmeticError, match="against torch"):
        timer(shape.preferred)


@pytest.mark.parametrize("parts", [1, 2])
def test_parts_of_k_are_tried_too(parts: int) -> None:
    shape = class_of(SPECS["up"])
    timer = DeviceTimer(shape, torch.device("cpu"), one_second)
    assert timer(Schedule(16, 32, 16, 1, 1, 4, parts=parts)) == 1.0


def test_a_kernel_without_a_choice_has_no_trial() -> None:
    with pytest.raises(TypeError, match="point_grad"):
        trial_of(class_of(PointGradSpec(8, "float32")), torch.device("cpu"))

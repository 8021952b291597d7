"""What is printed: programs, schedules, sources, and what compilers make of them without a device."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.codegen import (
    CannotLower,
    CombineSpec,
    LinearSpec,
    RegionSpec,
    runtime,
    store,
    target,
    trace_pointwise,
)
from moefx.errors import OptionError

GOLDENS = Path(__file__).parent / "goldens"
DEVICES = ("sm_80", "sm_90", "sm_100", "gfx942")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def gelu_tanh(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def swiglu(z: Tensor) -> Tensor:
    return F.silu(z[..., : z.shape[-1] // 2]) * z[..., z.shape[-1] // 2 :]


def up_projection() -> LinearSpec:
    return LinearSpec(1152, 4608, "bfloat16", True, True, 2, trace_pointwise(gelu_tanh, 4608))


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        gelu_tanh,
        F.silu,
        lambda z: F.relu(z) ** 2,
        lambda z: torch.relu_(z).pow_(2),
        F.mish,
        F.hardswish,
        F.elu,
        F.softplus,
        F.logsigmoid,
        lambda z: z.clamp(-1, 2),
        lambda z: 1 - z.add(2.0, alpha=0.5),
        lambda z: torch.rsub(z, 3, alpha=2),
        lambda z: (z * z + 1).pow(-3) + (z * z + 1).pow(1.5) + z.pow(0),
        lambda z: 2.0**z + (z > 0) * z + (z > 1).logical_not(),
        lambda z: z.sign() + torch.where((z > 0) & (z < 1), z, -z),
        lambda z: torch.nn.functional.dropout(z, 0.5, training=False).to(torch.float32).reshape(z.shape),
        torch.nn.GELU(),
        torch.nn.ReLU(inplace=True),
    ],
)
def test_any_pointwise_function_becomes_a_program(function: object) -> None:
    program = trace_pointwise(function, 8)  # type: ignore[arg-type]
    z = torch.linspace(-4, 4, 40, dtype=torch.float64).view(5, 8)
    expected = function(z.clone())  # type: ignore[operator]
    torch.testing.assert_close(program.evaluate(z), expected, atol=1e-6, rtol=1e-6, check_dtype=False)


@pytest.mark.parametrize("gate", [swiglu, F.glu, lambda z: z.chunk(2, -1)[1] * z.chunk(2, -1)[0].tanh()])
def test_gated_functions_read_two_halves(gate: object) -> None:
    program = trace_pointwise(gate, 8)  # type: ignore[arg-type]
    z = torch.randn(5, 8, dtype=torch.float64)
    assert program.inputs == 2
    torch.testing.assert_close(program.evaluate(*z.chunk(2, -1)), gate(z))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda z: z.softmax(-1), "amax"),
        (lambda z: F.dropout(z, 0.5, training=True), "bernoulli|shape"),
        (lambda z: torch.lgamma(z), "lgamma"),
        (lambda z: z + torch.arange(8.0), "reads the tensor|arange|iota"),
        (lambda z: z.to(torch.int32), "int32"),
        (lambda z: z[:, :3], "half"),
        (lambda z: z.cumsum(-1), "cumsum|broadcast_in_dim"),
        (lambda z: z * z.sum(), "sum"),
        (lambda z: z.chunk(2, -1)[0] * z.mean(), "prims|sum|mean"),
        (lambda z: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_not_pointwise_is_refused_with_the_operator(function: object, reason: str) -> None:
    with pytest.raises(CannotLower, match=reason):
        trace_pointwise(function, 8)  # type: ignore[arg-type]


def test_equal_expressions_are_one_kernel_in_any_spelling() -> None:
    spellings = [lambda z: F.silu(z), lambda z: z * torch.sigmoid(z), torch.nn.SiLU()]
    names = {LinearSpec(64, 64, "float32", epilogue=trace_pointwise(f, 64)).name for f in spellings}
    assert len(names) == 1


def test_specs_refuse_dtypes_without_kernels() -> None:
    with pytest.raises(CannotLower, match="float64"):
        LinearSpec(64, 64, "float64")


def test_unknown_target_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'sm_90'"):
        target("sm90")


def test_the_sources_of_a_region_are_its_kernels_in_order() -> None:
    up, down = up_projection(), LinearSpec(4608, 1152, "bfloat16", True)
    region = RegionSpec((up, down), CombineSpec(1152, 2, "bfloat16"))
    found = runtime.sources(region, target("sm_90"), 8192, 8)
    assert list(found) == ["tile_map", up.name, down.name, region.combine.name]  # type: ignore[union-attr]
    for source in found.values():
        compile(source, "emitted", "exec")


def test_sources_are_kept_on_disk_and_a_changed_file_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    source = "answer = 42\n"
    path = store.save(source, "stem")
    assert path is not None
    assert path.read_text() == source
    path.write_text("raise RuntimeError('tampered')\n")
    assert store.load(source, "stem").answer == 42
    assert path.read_text() == source
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_unwritable_folder_means_memory_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(blocker))
    caplog.set_level(logging.WARNING, logger="moefx.codegen.store")
    assert store.load("one = 1\n", "in_memory_one").one == 1
    assert store.load("two = 2\n", "in_memory_two").two == 2
    assert len(caplog.records) == 1
    assert "MOEFX_CACHE_DIR" in caplog.text

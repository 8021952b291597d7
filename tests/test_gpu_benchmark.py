"""The GPU benchmark, rehearsed on a CPU with toy sizes, so that it is known to run; and the floors it divides by."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.test_codegen_kernels import why_no_interpreter

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of the benchmark, as the script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in set(sys.modules) - before:
        if name.startswith("_gpu") or name == "gpu":
            del sys.modules[name]


def rehearse(out: Path, cache: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--quick", "--out", str(out), *arguments]
    full = {**os.environ, "OMP_NUM_THREADS": "1", "MOEFX_CACHE_DIR": str(cache), **environment}
    done = subprocess.run(command, env=full, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    assert (out / "gpu.md").read_text().strip() == done.stdout.strip()
    return result


@pytest.mark.slow
def test_the_whole_benchmark_runs(tmp_path: Path) -> None:
    peers = tmp_path / "peers"
    peers.mkdir()
    (peers / "wrong.py").write_text(
        "def build(case):\n    return lambda: case.x * case.w1.sum() * case.w2.sum() * case.gates.sum()\n"
    )
    (peers / "absent.py").write_text("def build(case):\n    import a_package_that_is_not_there\n")
    on = {} if why_no_interpreter() else {"TRITON_INTERPRET": "1"}
    result = rehearse(tmp_path / "out", tmp_path / "cache", "--peers", str(peers), **on)
    names = {row["implementation"] for row in result["ffn"]}
    assert {"moefx", "moefx eager", "dense, equal FLOPs", "sorted loop", "padded bmm", "grouped_mm"} <= names
    assert {"dense, equal tokens", "HiDream's loop"} <= names
    assert not {"wrong", "absent"} & names, "what fails the comparison is not timed"
    assert any(line.startswith("wrong: relative error") for line in result["left_out"])
    assert any(line.startswith("absent: ModuleNotFoundError") for line in result["left_out"])
    assert all(row["us"] > 0 and row["us_again"] > 0 and row["floor_us"] > 0 for row in result["ffn"])
    assert all(row["first_call_s"] > 0 and "launches" in row and "peak_mb" in row for row in result["ffn"])
    assert {row["direction"] for row in result["ffn"]} == {"forward", "training forward", "forward + backward"}
    assert {row["routing"] for row in result["ffn"]} == {"balanced", "skewed", "all to one", "recorded"}
    assert {row["implementation"] for row in result["ffn"] if "gated" in row["shape"]} >= names - {"HiDream's loop"}
    assert {row["implementation"] for row in result["steps"]} >= {"dense, inductor", "routed, moefx", "SDPA, all heads"}
    assert all(row["us_again"] > 0 and "launches" in row and "peak_mb" in row for row in result["steps"])
    heads = [row["direction"] for row in result["steps"] if row["implementation"] == "moefx, half of the heads"]
    assert heads == ["forward", "forward + backward"]
    parts = [row["implementation"] for row in result["steps"] if row["shape"].startswith("parts of the FFN")]
    assert parts == ["layer", "products", "router and grouping", "router and grouping, inductor"]
    assert all(row["floor_percent"] > 0 for row in result["steps"] if row["shape"] == "toy block")
    assert "Router, grouping and combine:" in (tmp_path / "out" / "gpu.md").read_text()
    assert any(line.startswith("calibration:") for line in result["left_out"]), "there is no device to fit to"
    if on:
        assert result["schedules"], "the forms of a kernel are run as well"
        assert all(row["us_again"] > 0 and row["model_us"] > 0 for row in result["schedules"])
    assert max(row["error"] for row in result["errors"] if row["implementation"].startswith("moefx")) < 1e-4
    assert "rehearsal" in (tmp_path / "out" / "gpu.md").read_text()


def test_without_a_device_it_says_how_to_rehearse(load: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit, match="--device cpu --quick"):
        load("gpu").main([])


@pytest.mark.parametrize(
    ("tokens", "experts", "slots", "floors"),
    [(4096, 8, 2, (220, 440)), (256, 8, 1, (41, 83)), (1024, 16, 2, (91, 189)), (16384, 8, 1, (440, 881))],
)
def test_floors_are_those_of_the_roofline(
    load: Any, tokens: int, experts: int, slots: int, floors: tuple[int, int]
) -> None:
    cases = load("_gpu_cases")
    shape = cases.Shape("DiT-XL/2", tokens, 1152, 4608, experts, slots)
    found = cases.Ceilings(790e12, 4.3e12)
    forward = found.floor_s(shape, "forward") * 1e6
    backward = found.floor_s(shape, "forward + backward") * 1e6 - forward
    assert forward == pytest.approx(floors[0], rel=0.05)
    assert backward == pytest.approx(floors[1], rel=0.15)


def test_routings_are_what_they_are_called(load: Any) -> None:
    cases = load("_gpu_cases")
    shape = cases.Shape("x", 512, 8, 8, 8, 2)
    drawn = {routing: cases.draw_experts(shape, routing, torch.device("cpu")) for routing in cases.ROUTINGS}
    counts = {routing: torch.bincount(chosen.flatten(), minlength=8) for routing, chosen in drawn.items()}
    assert counts["balanced"].unique().tolist() == [128]
    assert int(counts["recorded"].min()) < 0.2 * int(counts["recorded"].max())
    assert counts["all to one"].tolist() == [512, 512, 0, 0, 0, 0, 0, 0]
    assert int(counts["skewed"].max()) > 3 * int(counts["skewed"].min())
    assert bool((drawn["skewed"][:, 0] != drawn["skewed"][:, 1]).all())


def test_the_summary_compares_with_the_best_peer(load: Any) -> None:
    report = load("_gpu_report")

    def row(name: str, us: float) -> dict[str, Any]:
        same = {"shape": "s", "routing": "balanced", "direction": "forward", "mode": "eager"}
        return same | {"implementation": name, "us": us, "us_again": us * 1.1}

    rows = report.with_ratios([row("moefx", 10.0), row("a", 15.0), row("b", 30.0), row("dense, equal FLOPs", 5.0)])
    assert [r["speedup"] for r in rows] == [1.0, 1.5, 3.0, 0.5]
    text = report.summary(rows)
    assert "1.50 times the best peer" in text
    assert "10.0 %" in text

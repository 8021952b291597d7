"""What compilers make of the kernels without a device: spills, shared memory, matrix instructions, divided warps."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moefx.codegen import CannotLower, CombineSpec, LinearSpec, Schedule, choose, emit, store, target, trials
from moefx.codegen.aot import (
    MATRIX_INSTRUCTIONS,
    Compiled,
    Job,
    NotInTime,
    compile_all,
    compile_for,
    compile_module,
    compile_within,
    job,
    launch_job,
    tile_map_job,
)
from moefx.codegen.disassembly import read_gcn
from moefx.codegen.schedule import ranked
from moefx.codegen.tune import ShapeClass
from tests.codegen_support import DEVICES, STANDARD, best, down_projection, needs_triton, up_projection

pytestmark = needs_triton

#: (kernel, target, variant, divided warps): every standard kernel in the variants that its target has.
CASES = [
    *[("up", device, "pointer", None) for device in DEVICES],
    *[("down", device, "pointer", None) for device in DEVICES],
    ("gated", "sm_90", "pointer", None),
    ("two weights", "sm_90", "pointer", None),
    ("two weights", "sm_80", "pointer", None),
    ("up", "sm_90", "tma", True),
    ("down", "sm_90", "tma", True),
    ("gated", "sm_90", "tma", True),
    ("up", "sm_90", "tma", False),
    ("up", "sm_100", "tma", True),
    ("down", "sm_100", "tma", True),
    ("two weights", "sm_100", "tma", False),
]


def case_job(kernel: str, device: str, variant: str, divided: bool | None) -> Job:
    spec, chosen = STANDARD[kernel](), target(device)
    return job(spec, best(spec, chosen, 1024, variant=variant, divided=divided), chosen)


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[object, ...], Compiled | CannotLower]:
    """Compile all cases at once, several children at a time; results are kept by content between runs."""
    return dict(zip(CASES, compile_all([case_job(*case) for case in CASES]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_standard_kernels_fit_their_target(
    case: tuple[str, str, str, bool | None], compiled: dict[tuple[object, ...], Compiled | CannotLower]
) -> None:
    found = compiled[case]
    assert isinstance(found, Compiled), found
    _, device, variant, divided = case
    main = found.main
    assert not found.problems(target(device))
    assert main.count(MATRIX_INSTRUCTIONS[device]) > 0, main.row()
    assert 0 < main.registers <= 255
    assert 0 < main.shared_bytes <= target(device).shared_limit_bytes
    assert divided is None or main.is_specialised == divided, main.row()
    if device != "gfx942":
        copies = "UTMALDG" if variant == "tma" else "LDGSTS"
        assert main.count(copies) > 0, f"tiles are to be copied asynchronously: {main.row()}"


def few_rows(kernel: str, device: str, *, parts: bool, swapped: bool) -> Job:
    """Return the job of the cheapest schedule of a form, for four rows per expert."""
    spec, chosen = STANDARD[kernel](), target(device)
    found = next(s for s in ranked(spec, chosen, 4, 8) if (s.parts > 1, s.swapped) == (parts, swapped))
    assert found.block_m == 16
    return job(spec, found, chosen)


@pytest.mark.slow
def test_few_rows_stream_the_weights() -> None:
    """Tiles of 16 rows, whose weights are copied ahead of their products: whole, in parts of K, operands swapped."""
    jobs = {
        **{(device, "up"): few_rows("up", device, parts=False, swapped=False) for device in ("sm_80", "gfx942")},
        **{(device, "down"): few_rows("down", device, parts=True, swapped=False) for device in DEVICES},
        **{(device, "swapped"): few_rows("gated", device, parts=True, swapped=True) for device in ("sm_90", "sm_100")},
    }
    for (device, form), found in zip(jobs, compile_all(list(jobs.values())), strict=True):
        assert isinstance(found, Compiled), found
        assert not found.problems(target(device))
        assert [one.kernel.rpartition(".")[2] == "reduce" for one in found.kernels] == [True, False][form == "up" :]
        # Sixteen rows fill the narrow instructions, and the weights' columns the wide ones.
        narrow = "v_mfma" if device == "gfx942" else "HMMA"
        assert found.main.count(MATRIX_INSTRUCTIONS[device] if form == "swapped" else narrow) > 0, found.main.row()
        if device != "gfx942":
            assert found.main.count("LDGSTS") > 0, found.main.row()


def test_what_is_not_ready_in_time_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    one = job(CombineSpec(48, 1, "float32"), None, target("sm_80"))
    start = time.monotonic()
    late = compile_within([one, one], 0.3)
    assert time.monotonic() - start < 5.0
    assert [type(found) for found in late] == [NotInTime, NotInTime]
    assert "no result after" in str(late[0])
    assert type(compile_within([one], 0.0)[0]) is NotInTime
    compiled = compile_module(one)
    assert compile_within([one], 0.0) == [compiled], "what is kept takes no time"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_launch_finds_what_was_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in a child for the operands of a trial, then launched on them, up to the device that is not there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    spec, device = LinearSpec(40, 24, "bfloat16", True, True, 2), target("sm_90")
    monkeypatch.setattr(trials.runtime, "tile_map", lambda *_: torch.zeros((3, 11), dtype=torch.int32))
    trial = trials.trial_of(ShapeClass(spec, device, "d", 4, 8, 16), torch.device("cpu"))
    schedule = Schedule(16, 32, 16, 4, 2, parts=2)
    (ahead,) = compile_within([launch_job(spec, schedule, trial.arguments(schedule), device)], 60)
    assert isinstance(ahead, Compiled), ahead
    before = set((tmp_path / "triton").iterdir())
    assert len(before) >= 2, "the products and their sum"

    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0)
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: run(self, *a, **(k | {"warmup": True})))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    store.load(emit(spec, schedule), spec.name).launch(*trial.arguments(schedule))
    assert set((tmp_path / "triton").iterdir()) == before


@pytest.mark.parametrize("width", [100, 1150])
def test_rows_of_any_width_compile(width: int) -> None:
    spec = LinearSpec(width, 300, "bfloat16", True, True, 1)
    found = compile_module(job(spec, choose(spec, target("sm_90"), 256, 8), target("sm_90")))
    assert not found.problems(target("sm_90"))
    assert found.main.count("HGMMA") > 0


@pytest.mark.parametrize("kernel", ["up", "two weights"])
def test_kernels_that_keep_their_products_do_not_spill(kernel: str) -> None:
    spec = dataclasses.replace(STANDARD[kernel](), keep=True)
    found = compile_module(job(spec, choose(spec, target("sm_90"), 1024, 8), target("sm_90")))
    assert not found.problems(target("sm_90"))
    assert found.main.count("HGMMA") > 0


def test_combine_compiles_with_what_it_starts_before() -> None:
    found = compile_module(job(CombineSpec(1152, 2, "bfloat16"), None, target("sm_90")))
    assert [one.kernel.rpartition(".")[2] == "invert" for one in found.kernels] == [True, False]
    assert not found.problems(target("sm_90"))


def test_tile_map_compiles() -> None:
    found = compile_module(tile_map_job(target("sm_90"), 128))
    assert not found.problems(target("sm_90"))


def test_a_failing_compilation_is_a_reason() -> None:
    spec = up_projection()
    broken = dataclasses.replace(best(spec, target("sm_90"), 1024, variant="pointer"), block_m=96)
    with pytest.raises(CannotLower, match="exit status") as raised:
        compile_for(spec, broken, target("sm_90"))
    assert "work-" not in str(raised.value), "the folder is nobody's business and changes"


def test_spills_and_shared_memory_are_problems() -> None:
    spec = down_projection()
    wide = Schedule(128, 256, 128, 4, 3, 8)
    (found,) = compile_all([job(spec, wide, target("sm_90"))])
    assert isinstance(found, Compiled)
    problems = " ".join(found.problems(target("sm_90")))
    assert "spills" in problems
    assert "shared memory" in problems


def test_results_are_kept_and_damaged_ones_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    one = job(CombineSpec(64, 1, "float32"), None, target("sm_80"))
    first = compile_module(one)
    assert (first.folder / "kernel.cubin").stat().st_size > 0
    kept = first.folder / "resources.json"
    rows = json.loads(kept.read_text())
    rows[-1]["registers"] = 99
    kept.write_text(json.dumps(rows))
    assert compile_module(one).main.registers == 99, "read, not compiled"
    kept.write_text("{")
    assert compile_module(one).main == first.main


def test_without_a_cache_folder_results_are_still_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(blocker))
    found = compile_module(job(CombineSpec(32, 1, "float32"), None, target("sm_80")))
    assert (found.folder / "kernel.cubin").exists()


def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(CannotLower, match="interpreter"):
        compile_for(CombineSpec(32, 1, "float32"), None, target("interpreter"))


def test_gcn_is_read() -> None:
    code = read_gcn("  v_mfma_f32_32x32 v[0:3]\n  scratch_load v1\n  .vgpr_count:     128\n  .vgpr_spill_count: 3\n")
    assert (code.registers, code.spill_bytes, code.counts["v_mfma"], code.counts["scratch_load"]) == (128, 12, 1, 1)

"""``moefx codegen`` and what a bundle of kernels holds."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from moefx.codegen import CombineSpec, LinearSpec, RegionSpec, bundle, target
from moefx.codegen.aot import Compiled, Job, Resources
from moefx.codegen.reasons import CannotLower
from tests.codegen_support import needs_triton, up_projection
from tests.test_cli import run

DIT = "diffusers:DiTTransformer2DModel"


@needs_triton
def test_a_model_becomes_a_folder_of_kernels(tmp_path: Path) -> None:
    out = tmp_path / "kernels"
    result = run(
        "codegen", DIT, "--target", "sm_90", "--dtype", "bfloat16", "--load", "256", "--out", str(out), "--json"
    )
    table = json.loads(result.stdout)
    assert table == json.loads((out / "resources.json").read_text())
    kernels = {row["kernel"]: row for row in table["kernels"]}
    assert len(kernels) == 6
    up = next(row for name, row in kernels.items() if name.startswith("gather_grouped_linear_32x128_bfloat16"))
    assert up["matrix"].get("HGMMA", 0) > 0
    assert (up["spill_bytes"], up["problems"]) == (0, [])
    for name in kernels:
        ast.parse((out / "sm_90" / f"{name}.py").read_text())
        assert (out / "sm_90" / f"{name}.kernel.cubin").stat().st_size > 1000
    assert "wrote 15 files" in result.stderr


@needs_triton
def test_training_brings_the_backward_kernels(tmp_path: Path) -> None:
    table = json.loads(run("codegen", DIT, "--training", "--dtype", "float16", "--out", str(tmp_path), "--json").stdout)
    names = [row["kernel"] for row in table["kernels"]]
    assert any("keeping" in name for name in names)
    assert sum("weight_grad" in name for name in names) == 2
    assert not [row["problems"] for row in table["kernels"] if row["problems"]]


@needs_triton
def test_two_targets_are_two_folders_and_one_text_table(tmp_path: Path) -> None:
    result = run("codegen", DIT, "--target", "sm_80", "--target", "gfx942", "--out", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"sm_80", "gfx942", "resources.json"}
    assert result.stdout.count("tile_map") == 2
    assert list((tmp_path / "gfx942").glob("*.hsaco"))
    assert "reg" in result.stdout.splitlines()[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([DIT, "--target", "sm90"], 2, "did you mean 'sm_90'"),
        (["tests.cli_models:plain"], 3, "found"),
        ([DIT, "--dtype", "int8"], 2, "kernels take bfloat16"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    result = run("codegen", *arguments, "--out", str(tmp_path / "out"), code=code)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_lowered_stage_says_what_has_kernels() -> None:
    text = run("dump", DIT, "--stage", "lowered", "--target", "sm_80").stdout
    assert "transformer_blocks.0.ff" in text
    assert "sm_80, tile" in text
    data = json.loads(run("dump", DIT, "--stage", "lowered", "--json").stdout)
    (region,) = data["regions"]
    assert len(region["sites"]) == 2
    assert region["rows"] == region["experts"] * 12.5
    refused = json.loads(run("dump", "tests.test_codegen_cli:in_float64", "--stage", "lowered", "--json").stdout)
    assert not refused["regions"]
    assert "float64" in refused["refused"][0]["reason"]


def in_float64() -> object:
    """Return a model whose dtype no kernel takes."""
    from tests.cli_models import dit_with_inputs

    model, (x, t, y) = dit_with_inputs()
    return model.double(), (x.double(), t.double(), y)


def test_the_kernels_stage_is_python() -> None:
    text = run("dump", DIT, "--stage", "kernels", "--target", "sm_100").stdout
    tree = ast.parse(text)
    assert sum(isinstance(node, ast.FunctionDef) and node.name == "launch" for node in tree.body) == 6


def fake_compiler(faults: dict[str, str]) -> object:
    """Return a compiler that fails or spills for tiles named by their text."""

    def compile_module(job: Job) -> Compiled:
        for tile, fault in faults.items():
            if f"tile {tile}" in job.source and fault == "fails":
                raise CannotLower("compile", found="PassManager::run failed")
        spill = 64 if any(f"tile {tile}" in job.source for tile, fault in faults.items() if fault == "spills") else 0
        return Compiled(job.source, (Resources(job.name, job.target.name, 99, spill, 1024, 4, ()),), Path())

    return compile_module


def linear_only(monkeypatch: pytest.MonkeyPatch, faults: dict[str, str]) -> bundle.Built:
    monkeypatch.setattr(bundle.aot, "compile_module", fake_compiler(faults))
    spec = up_projection()
    built = bundle.build([(RegionSpec((spec,)), 8192, 8)], [target("sm_80")])
    return next(one for one in built if one.name == spec.name)


def test_faulty_configurations_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    first = linear_only(monkeypatch, {})
    assert first.schedule is not None
    tile = f"{first.schedule.block_m}x{first.schedule.block_n}x"
    for fault in ("fails", "spills"):
        second = linear_only(monkeypatch, {tile: fault})
        assert second.schedule not in (None, first.schedule)
        assert not second.problems
        assert len(second.pruned) == 1


def test_a_spilling_gradient_takes_other_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle.aot, "compile_module", fake_compiler({"128x128x64": "spills"}))
    built = bundle.build([(RegionSpec((up_projection(),)), 8192, 8)], [target("sm_80")], training=True)
    (found,) = (one for one in built if one.name.startswith("weight_grad"))
    assert found.schedule is not None
    assert found.schedule.block_n < 128
    assert not found.problems
    assert len(found.pruned) == 1


def test_if_every_configuration_is_faulty_that_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = linear_only(monkeypatch, {"": "spills"})
    assert "spills 64 B" in spilling.problems[0]
    failing = linear_only(monkeypatch, {"": "fails"})
    assert failing.compiled is None
    assert "does not compile for sm_80" in failing.problems[0]
    assert failing.row()["problems"] == failing.problems


def test_a_kernel_of_two_regions_is_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle.aot, "compile_module", fake_compiler({}))
    up, down = LinearSpec(64, 128, "float32", gather=True), LinearSpec(128, 64, "float32")
    one, two = RegionSpec((up, down), CombineSpec(64, 1, "float32")), RegionSpec((up,))
    built = bundle.build([(one, 512, 8), (two, 512, 8)], [target("sm_80")])
    assert len(built) == bundle.count([(one, 512, 8), (two, 512, 8)], [target("sm_80")]) == 4
    assert torch.tensor([len(b.problems) for b in built]).sum() == 0

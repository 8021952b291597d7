"""The moefx command: names of models, exit codes, JSON, pipes; data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moefx.cli import app

ROOT = Path(__file__).parent.parent
DIT = "diffusers:DiTTransformer2DModel"
OWN = "tests.cli_models:dit_with_inputs"


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def command(*args: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", "from moefx.cli import main; main()", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        cwd=ROOT,
        capture_output=True,
        timeout=200,
    )


# -------------------------------------------------------------------------------------------------------------- models


def test_a_factory_may_print_and_its_inputs_may_come_from_elsewhere() -> None:
    with_inputs = run("dump", OWN)
    assert "noise" not in with_inputs.stdout
    assert "noise" in with_inputs.stderr
    assert run("dump", "tests.cli_models:dit", "--inputs", "tests.cli_models:dit_inputs").stdout == with_inputs.stdout
    missing = run("dump", "tests.cli_models:dit", code=2)
    assert missing.stdout == ""
    assert "do: " in missing.stderr


def test_a_config_builds_any_size_on_meta(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72}))
    out = run("dump", DIT, "--config", str(config), "--meta").stdout
    assert "transformer_blocks.{0…27}  ×28" in out
    assert "1152→4608→1152" in out
    run("dump", DIT, "--config", str(tmp_path / "none.json"), code=2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nosuchpackage.x:make", "No module named"),
        ("tests.cli_models:dti", "did you mean 'dit'"),
        ("tests.cli_models:number", "it returned a int"),
        ("tests.cli_models", "neither a name nor a folder"),
        ("diffusers:DiTTransformer2D", "did you mean 'DiTTransformer2DModel'"),
    ],
)
def test_names_that_are_no_models(name: str, expected: str) -> None:
    result = run("dump", name, code=2)
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_what_a_factory_raises_is_cleaned_and_debuggable(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("sites", "tests.cli_models:broken", code=2)
    assert "\x1b" not in result.stderr
    assert "\\x1b[31mweights" in result.stderr
    monkeypatch.setenv("MOEFX_DEBUG", "1")
    shown = CliRunner().invoke(app, ["sites", "tests.cli_models:broken"])
    assert isinstance(shown.exception, RuntimeError)


# ------------------------------------------------------------------------------------------------------------ commands


def test_dump_in_every_stage_and_format(tmp_path: Path) -> None:
    from moefx.inspect.dump import STAGES

    for stage, formats in STAGES.items():
        for kind in formats:
            assert run("dump", OWN, "--stage", stage, "-f", kind).stdout.strip()
    out = tmp_path / "dump.svg"
    assert run("dump", OWN, "-f", "svg", "--out", str(out)).stdout == ""
    assert out.read_text().startswith("<svg ")
    assert run("dump", OWN, "--diff").stdout.startswith("--- dense\n+++ routed\n")
    run("dump", OWN, "--out", str(tmp_path / "none" / "x"), code=2)


def test_the_lists_of_stages_and_formats_are_those_of_dump() -> None:
    from moefx.cli.options import FORMAT_NAMES, STAGE_NAMES
    from moefx.inspect.dump import FORMATS, STAGES

    assert tuple(STAGES) == STAGE_NAMES
    assert FORMATS == FORMAT_NAMES


def test_sites_and_their_explanation() -> None:
    sites = json.loads(run("sites", OWN, "--json").stdout)["sites"]
    name = next(s["name"] for s in sites if s["kind"] == "ffn")
    assert name in run("sites", OWN).stdout
    assert f"{name}: ffn" in run("sites", OWN, "--explain", name).stdout
    assert "did you mean" in run("sites", OWN, "--explain", name + "x", code=3).stderr


def test_plan_takes_typed_options() -> None:
    plan = json.loads(run("plan", OWN, "-o", "experts=4", "-o", "top-k=1", "-o", "noise=0.5", "--json").stdout)["plan"]
    options = plan["passes"][0]["options"]
    assert (options["experts"], options["top_k"], options["noise"]) == (4, 1, 0.5)
    assert json.loads(run("plan", OWN, "-o", "normalise=none", "-o", "untie=true", "--json").stdout)
    only = json.loads(run("plan", OWN, "--only", "*.0.*", "--json").stdout)["plan"]
    assert len(only["sites"]) == 1


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["-o", "experts=many"], 2, "valid integer"),
        (["-o", "experts"], 2, "key=value"),
        (["-o", "expert=3"], 2, "did you mean 'experts'"),
        (["-o", "experts=2", "-o", "top_k=4"], 2, "top_k = 4 of only 2 experts"),
        (["--recipe", "sparse-upcycle"], 2, "did you mean 'sparse-upcycling'"),
        (["--only", "nothing.*"], 3, "no site of that name"),
        (["--skip", "ffn"], 3, "no site to rewrite"),
        (["--seed", "x"], 2, "valid int"),
    ],
)
def test_requests_that_cannot_be_met(args: list[str], code: int, expected: str) -> None:
    result = run("plan", OWN, *args, code=code)
    assert expected in result.stderr
    as_json = run("plan", OWN, *args, "--json", code=code)
    error = json.loads(as_json.stdout)
    assert error["format"] == "moefx.error"
    assert error["error"]["exit_code"] == code
    assert expected in json.dumps(error)


def test_a_model_without_a_site_exits_with_3() -> None:
    assert "no site to rewrite" in run("plan", "tests.cli_models:plain", code=3).stderr
    assert run("dump", "tests.cli_models:plain").stdout.startswith("Sequential: ")


def test_weights_that_are_not_finite_exit_with_4() -> None:
    assert "NaN" in run("verify", "tests.cli_models:sick", code=4).stderr


def test_transform_save_verify_and_a_damaged_folder(tmp_path: Path) -> None:
    folder = tmp_path / "routed"
    receipt = json.loads(run("transform", DIT, "--out", str(folder), "-o", "experts=4", "--json", "-q").stdout)
    assert receipt["report"]["checks"]
    assert "[routed: top-2 of 4]" in run("dump", str(folder)).stdout
    proof = json.loads(run("verify", str(folder), "--against", DIT, "--json").stdout)
    assert proof["ok"] is True
    assert proof["error"] <= proof["bound"]
    assert "at most" in run("verify", str(folder), "--against", DIT, "--seed", "1", code=4).stderr
    weights = next(folder.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert run("verify", str(folder), code=5).stdout == ""
    run("dump", str(folder), code=5)
    run("verify", str(tmp_path / "none"), code=5)


def test_a_saved_model_of_ones_own_is_verified_against_its_factory(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    run("transform", OWN, "--out", str(folder), "-q")
    assert "relative error" in run("verify", str(folder), "--against", OWN).stdout


def test_verify_of_a_model_shows_each_check() -> None:
    result = run("verify", OWN, "-q")
    assert "worst relative error" in result.stdout
    data = json.loads(run("verify", OWN, "--json").stdout)
    assert all(check["error"] <= check["bound"] for check in data["checks"])


def test_recipes() -> None:
    data = json.loads(run("recipes", "--json").stdout)["recipes"]
    assert {"sparse-upcycling", "mixture-of-heads"} <= {r["name"] for r in data}
    one = run("recipes", "drop-upcycling").stdout
    assert "arXiv 2502.19261" in one
    assert "reinitialise" in one
    run("recipes", "drop-up", code=2)


def test_doctor() -> None:
    data = json.loads(run("doctor", "--json").stdout)
    names = {check["name"]: check for check in data["checks"]}
    assert data["ok"] is True
    assert names["torch"]["ok"]
    assert "moefx::grouped_linear" in names["dialect"]["found"]
    assert "torch" in run("doctor").stdout


def test_doctor_reports_a_folder_it_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path / "file"))
    data = json.loads(run("doctor", "--json").stdout)
    assert not next(c for c in data["checks"] if c["name"] == "cache folder")["ok"]


# ----------------------------------------------------------------------------------------------- usage and the process


def test_help_names_everything() -> None:
    for name in ("dump", "sites", "plan", "transform", "verify", "recipes", "doctor"):
        text = run(name, "--help").stdout
        assert "--json" in text
    assert "5 unsafe input" in run("--help").stdout
    assert run("--version").stdout.startswith("moefx 0.")


def test_usage_errors_exit_with_2() -> None:
    assert "No such option" in run("dump", OWN, "--nope", code=2).stderr
    assert json.loads(run("dump", OWN, "--nope", "--json", code=2).stdout)["error"]["type"] == "UsageError"
    run("dupm", code=2)
    run("dump", code=2)
    assert "--json and --format differ" in run("dump", OWN, "-f", "svg", "--json", code=2).stderr


def test_models_recipes_and_stages_are_completed() -> None:
    from moefx.cli import options

    assert "diffusers:FluxTransformer2DModel" in options._models("diffusers:Flux")
    assert options.recipe_names("virtual") == ["virtual-groups"]
    assert options._stages("r") == ["routed"]


def test_two_processes_write_the_same_bytes_without_colour() -> None:
    """This process, whose hashes are seeded at random, and a fresh one."""
    other = command("dump", OWN, "--recipe", "sparse-upcycling", PYTHONHASHSEED="1", FORCE_COLOR="1")
    assert other.returncode == 0, other.stderr
    assert other.stdout.decode("utf-8") == run("dump", OWN, "--recipe", "sparse-upcycling").stdout
    assert b"\x1b" not in other.stdout
    assert other.stdout.startswith(b"DiT: ")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    line = f'"{sys.executable}" -c "from moefx.cli import main; main()" dump {OWN} --stage graph | head -1'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=ROOT, capture_output=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"# DiT: ")
    assert b"Broken" not in done.stderr


def test_exit_codes_and_errors_of_a_real_process() -> None:
    done = command("plan", "tests.cli_models:plain", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["type"] == "NothingMatched"
    assert done.stderr.startswith(b"error: ")
    assert b"Traceback" not in done.stderr


def test_the_command_starts_without_torch() -> None:
    code = "import sys, moefx.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

"""Copies, windows, meshes, checkpoints and lost processes, in real jobs of two to four processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 120
EQUAL, SINGLE = 1e-10, 1e-5
FLOATING = {"tokens_float", "bytes_equal_the_prediction", "parts_that_mix_tokens_are_refused"}
pytestmark = pytest.mark.slow


def job(group: str, folder: Path, ranks: int, *, fails: bool = False) -> dict[str, dict[str, Any]]:
    """Run a group of scenarios on so many processes and return their numbers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = ["-m", "tests.parallel_worker", group, str(folder)]
    done = subprocess.run(
        [*command, *script], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT
    )
    if fails:
        assert done.returncode != 0
        return {}
    assert done.returncode == 0, done.stdout + done.stderr
    read: dict[str, dict[str, Any]] = json.loads((folder / f"{group}-{ranks}.json").read_text())
    return read


def check(results: dict[str, dict[str, Any]], names: set[str]) -> None:
    assert results.keys() == names
    for name, numbers in results.items():
        assert numbers, f"{name} measured nothing"
        wrong = {key: value for key, value in numbers.items() if not value <= (SINGLE if "float32" in key else EQUAL)}
        assert not wrong, (name, wrong)


def test_copies_windows_and_bytes_on_two_processes(tmp_path: Path) -> None:
    names = {
        "copies_by_share",
        "copies_local_first",
        "copies_follow_training_and_loading",
        "chunks_overlap",
        "shared_experts_overlap",
        "once_per_rank",
        "once_saves_bytes",
        "random_schedules_end",
        "bytes_on_the_wire",
        "windows_switch_without_losing_optimizer_state",
        "switch_refusals",
    }
    check(job("two", tmp_path, 2), names)


def test_every_kind_of_experts_on_two_processes(tmp_path: Path) -> None:
    check(job("kinds", tmp_path, 2), {"every_kind", "foreign_experts_are_named"})


def test_tokens_that_float_on_two_processes(tmp_path: Path) -> None:
    check(job("floating", tmp_path, 2), FLOATING)


def test_small_devices_on_two_processes(tmp_path: Path) -> None:
    check(job("tiers", tmp_path, 2), {"small_devices_stream", "too_little_memory_is_refused"})


def test_bad_input_on_two_processes(tmp_path: Path) -> None:
    check(job("bad", tmp_path, 2), {"bad_input_is_an_error_on_every_rank"})


def test_denoisers_on_two_processes_equal_one(tmp_path: Path) -> None:
    check(job("dit+flux", tmp_path, 2), {"dit", "flux"})


def test_four_processes_as_mesh_and_a_checkpoint_that_resumes_on_two_and_three(tmp_path: Path) -> None:
    names = {"a_mesh_refuses_as_one", "experts_times_data", "under_ddp", "under_fsdp", "dit", "save_half_way"}
    names |= {"branches_on_different_ranks", "gradients_are_refused"}
    check(job("four+cfg+dit+save", tmp_path, 4), names)
    files = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert files == {"moefx_shards.json", "replicated.safetensors", *(f"rank-0000{r}.safetensors" for r in range(4))}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for damage in ("missing", "corrupt"):
        shutil.copytree(tmp_path / "checkpoint", tmp_path / damage)
    (tmp_path / "missing" / "rank-00001.safetensors").unlink()
    shard = tmp_path / "corrupt" / "rank-00002.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    check(job("resume", tmp_path, 2), {"resume"})
    check(job("resume+damaged", tmp_path, 3), {"resume", "damaged_checkpoint"})


def test_the_others_learn_of_a_killed_process_in_time(tmp_path: Path) -> None:
    job("lost", tmp_path, 3, fails=True)
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("lost-*.json"))]
    assert reports
    for report in reports:
        assert report["error"].startswith("LostRankError"), report
        assert "resume from the last complete checkpoint" in report["error"]
        assert report["seconds"] < 60

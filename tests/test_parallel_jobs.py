"""All that needs real processes, in one job of two and one of four; then resuming on two and three, and a loss."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.multiprocessing import ProcessExitedException

from tests.parallel_worker import main
from tests.ranks import run

EQUAL, SINGLE = 1e-10, 1e-5
Results = dict[str, dict[str, Any]]
TWO = {
    "two": (
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
    ),
    "kinds": ("every_kind", "foreign_experts_are_named"),
    "floating": ("tokens_float", "bytes_equal_the_prediction", "parts_that_mix_tokens_are_refused"),
    "tiers": ("small_devices_stream", "too_little_memory_is_refused"),
    "bad": ("bad_input_is_an_error_on_every_rank",),
    "dit": ("dit",),
    "flux": ("flux",),
}
FOUR = {
    "four": ("a_mesh_refuses_as_one", "experts_times_data", "under_ddp", "under_fsdp"),
    "cfg": ("branches_on_different_ranks", "gradients_are_refused"),
    "floating": TWO["floating"],
    "dit": ("dit",),
    "flux": ("flux",),
    "save": ("save_half_way", "save_divided"),
}
# A job takes a minute on two idle cores; where many wait for them, each exchange waits too.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def job(group: str, folder: Path, ranks: int) -> Results:
    """Run groups of scenarios on so many processes and return their numbers."""
    run(main, ranks, group, folder)
    read: Results = json.loads((folder / f"{group}-{ranks}.json").read_text())
    return read


def check(results: Results, names: Iterable[str]) -> None:
    for name in names:
        numbers = results.pop(name)
        assert numbers, f"{name} measured nothing"
        wrong = {key: value for key, value in numbers.items() if not value <= (SINGLE if "float32" in key else EQUAL)}
        assert not wrong, (name, wrong)


def test_two_processes(tmp_path: Path) -> None:
    results = job("+".join(TWO), tmp_path, 2)
    for names in TWO.values():
        check(results, names)
    assert not results, "scenarios that nobody reads"


def test_four_processes_whose_checkpoints_resume_on_two_and_three(tmp_path: Path) -> None:
    results = job("+".join(FOUR), tmp_path, 4)  # one test, so that no two workers run the job
    for names in FOUR.values():
        check(results, names)
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
    check(job("resume", tmp_path, 2), ("resume", "resume_divided"))
    check(job("resume+damaged", tmp_path, 3), ("resume", "resume_divided", "damaged_checkpoint"))


def test_the_others_learn_of_a_killed_process_in_time(tmp_path: Path) -> None:
    with pytest.raises(ProcessExitedException):
        run(main, 3, "lost", tmp_path, grace_s=90)
    reports = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("lost-*.json"))]
    assert reports
    for report in reports:
        assert report["error"].startswith("LostRankError"), report
        assert "resume from the last complete checkpoint" in report["error"]
        assert report["seconds"] < 60

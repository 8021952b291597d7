"""The quality benchmark: it runs, resumes, and its numbers mean what they say."""

import json
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.quality_runs import report
from benchmarks.quality_runs.conditions import TABLES
from benchmarks.quality_runs.settings import SETTINGS


def test_a_table_runs_and_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokens", "--steps", "2", "--seeds", "1", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    assert quality.main([*command, "--only", "dense"]) == 0
    path = tmp_path / "quality_tokens_digits.json"
    first = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert list(first) == ["dense, trained further"]
    assert quality.main(command) == 0
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert runs["dense, trained further"] == first["dense, trained further"]  # kept, not run again
    assert list(runs) == [c.name for c in TABLES["tokens"](SETTINGS["digits"])]
    half = runs["50 % of the tokens in every 2nd block"]["0"]
    assert half["flops_ratio"] < runs["dense, trained further"]["0"]["flops_ratio"] == 1
    assert half["loss"] == pytest.approx(sum(half["loss_by_bucket"]) / len(half["loss_by_bucket"]))
    assert (tmp_path / "quality_tokens_digits.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert printed.count("50 % of the tokens") == 1
    assert quality.main([*command, "--remeasure"]) == 0
    again = json.loads(path.read_text(encoding="utf-8"))["runs"]
    assert again != runs
    kept = {"loss", "loss_by_bucket", "frechet_pca", "steps"}
    assert all(again[n]["0"][key] == runs[n]["0"][key] for n in runs for key in kept)
    heads = [part if part != "tokens" else "heads" for part in command]
    assert quality.main([*heads, "--only", "dense"]) == 0
    shared = json.loads((tmp_path / "quality_heads_digits.json").read_text(encoding="utf-8"))["runs"]
    assert (
        shared["dense, trained further"] == again["dense, trained further"]
    )  # to the last digit of its measured time: taken from the other table
    assert quality.main([]) == 0
    assert "tokens:" in capsys.readouterr().out


@pytest.mark.parametrize("data", SETTINGS)
def test_a_name_means_one_run_in_all_tables(data: str) -> None:
    setting = SETTINGS[data]
    found = [(c.name, c.length(setting), c.scratch, c.train is None) for make in TABLES.values() for c in make(setting)]
    assert len({name for name, *_ in found}) == len(set(found))


def test_differences_are_paired_by_seed() -> None:
    dense = {"0": {"loss": 1.0}, "1": {"loss": 2.0}}
    assert report.against({"0": {"loss": 1.1}, "1": {"loss": 2.2}}, dense) == "+10.00 ± 0.00 %"
    assert report.against(dense, dense) == "-"
    assert report.cell([1.0, 3.0], 1) == "2.0 ± 1.4"

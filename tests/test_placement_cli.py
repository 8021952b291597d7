"""moefx topology, trace and place: what they print, write and refuse; and links measured on a running job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moefx.cli import app
from moefx.cli.place import parse_bytes
from moefx.cli.tables import bytes_text, seconds_text
from moefx.errors import InputError, OptionError
from moefx.passes.placement import Placement, RoutingTrace, Topology, strategies, synthesise
from moefx.passes.placement.measure import fit, measure, random_counts
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

ROOT = Path(__file__).parent.parent
SIZES = ("--width", "64", "--hidden", "256")


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def routed() -> torch.nn.Module:
    """Two routed FFNs, named on the command line as ``tests.test_placement_cli:routed``."""
    draws = torch.Generator().manual_seed(0)
    return torch.nn.Sequential(*(
        RoutedFFN(
            LinearRouter(8, 4, std=1.0, generator=draws),
            Experts(random_weights(8, 16, num_experts=4, generator=draws), torch.nn.functional.relu),
            top_k=2,
        )
        for _ in range(2)
    ))  # fmt: skip


def example(model: torch.nn.Module) -> tuple[torch.Tensor]:
    """Inputs of one rank."""
    del model
    return (torch.zeros(3, 5, 8),)


def steps(model: torch.nn.Module) -> Iterator[tuple[float, tuple[torch.Tensor]]]:
    """Three steps of three samples."""
    del model
    for sigma in (0.9, 0.5, 0.1):
        yield sigma, (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)) * sigma,)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.npz"
    synthesise("drifting", levels=6, layers=2, experts=8, tokens=32).save(path)
    return path


# ------------------------------------------------------------------------------------------------------------ topology


@pytest.mark.parametrize("name", ["processes:3", "node:2", "cluster:2x2", "edge"])
def test_a_printed_topology_is_a_file_that_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "topology.json"
    run("topology", name, "--json", "--out", path)
    again = json.loads(run("topology", path, "--json").stdout)
    assert again == json.loads(path.read_text())
    shown = run("topology", path).stdout
    assert all(device in shown for device in Topology.load(path).devices)
    (tmp_path / "topology.yaml").write_text(path.read_text())  # JSON is YAML
    pytest.importorskip("yaml")
    assert json.loads(run("topology", tmp_path / "topology.yaml", "--json").stdout) == again


def test_presets_price_what_stands_between_devices() -> None:
    cluster = Topology.cluster(2, 2)
    assert cluster.devices == ("node0.gpu0", "node0.gpu1", "node1.gpu0", "node1.gpu1")
    assert cluster.route(0, 1) == ["node0.gpu0", "node0.switch", "node0.gpu1"]
    assert cluster.route(0, 3) == ["node0.gpu0", "fabric", "node1.gpu1"]
    bytes_GG = np.zeros((4, 4))
    bytes_GG[0, 3] = bytes_GG[1, 3] = 50e9
    assert cluster.exchange_seconds(bytes_GG) == pytest.approx(2 + 20e-6), "one way into node1.gpu1"
    links = dict(zip(cluster.link_names, cluster.link_bytes(bytes_GG), strict=True))
    assert links["fabric->node1.gpu1"] == 100e9
    assert links["node0.gpu0->fabric"] == 50e9
    assert sum(links.values()) == 200e9
    edge = Topology.edge()
    assert edge.devices == ("gpu", "cpu")
    assert list(edge.tiers(0)) == ["host", "disk"], "fastest first"
    assert not edge.interchangeable
    assert Topology.node(8).interchangeable


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["nodes:8"], 2, "neither a preset nor"),
        (["cluster:2"], 2, "neither a preset nor"),
        (["processes:0"], 2, "neither a preset nor"),
        (["none.json"], 5, "No such file"),
        ([], 2, "neither a name nor --measure"),
        (["edge", "--measure"], 2, "a name and --measure"),
        (["--measure"], 2, "torchrun"),
    ],
)
def test_topologies_that_cannot_be_shown(args: list[str], code: int, says: str) -> None:
    assert says in run("topology", *args, code=code).stderr


def test_broken_files_and_islands_without_a_bridge_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text("devices: [")
    assert "cannot" in run("topology", path, code=5).stderr or "expected" in run("topology", path, code=5).stderr
    path.write_text("devices: [{name: a}, {name: b}]\nlinks: [{from: a, to: b, alpha_s: 0, beta_s_per_byte: 1}]")
    assert "no path from b to a" in run("topology", path, code=2).stderr


def test_the_fit_finds_the_model_that_made_the_times() -> None:
    """From one price for all bytes to one per link; with noise the simpler model wins unless it is wrong."""
    draws = np.random.default_rng(0)
    sent = np.array(random_counts(4, 60, draws))
    assert not np.diagonal(sent, axis1=1, axis2=2).any()
    prices_GG = draws.uniform(1e-9, 6e-9, (4, 4))
    ways = np.concatenate([sent.sum(axis=2), sent.sum(axis=1)], axis=1)
    work = {
        "bus": sent.sum(axis=(1, 2)) * 2e-9,
        "switch": ways.max(axis=1) * 2e-9,
        "ways": (ways * np.concatenate([prices_GG[0], prices_GG[1]])).max(axis=1),
        "links": (sent * prices_GG).sum(axis=(1, 2)),
    }
    for model, seconds in work.items():
        found = fit(sent, 3e-4 + seconds, [1e9, 1e9, 2e9, 2e9])
        assert found.model == model
        assert found.alpha_s == pytest.approx(3e-4, rel=1e-5)
        assert found.error < 0.02 < 0.04 < found.errors["bus" if model != "bus" else "switch"]
        assert found.topology.speeds.tolist() == [0.5, 0.5, 1, 1]
        predicted = [found.topology.exchange_seconds(bytes_GG) for bytes_GG in sent]
        np.testing.assert_allclose(predicted, 3e-4 + seconds, rtol=1e-6)
        noisy = fit(sent, (3e-4 + seconds) * draws.uniform(0.95, 1.05, len(sent)), [1e9] * 4)
        assert noisy.model == model
        if model == "links":
            apart = ~np.eye(4, dtype=bool)
            np.testing.assert_allclose(found.beta_s_per_byte[apart], prices_GG[apart], rtol=1e-5)
    with pytest.raises(InputError, match="torchrun"):
        measure()


def test_two_processes_measure_each_other(tmp_path: Path) -> None:
    script, out = tmp_path / "moefx_main.py", tmp_path / "measured.json"
    script.write_text("from moefx.cli import main\nmain()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(
        [*command, "topology", "--measure", "--json", "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Topology.load(out)
    assert found.devices == ("rank0", "rank1")
    assert (found.flops_per_s > 1e8).all()
    bytes_GG = np.array([[0, 1e8], [1e8, 0]])
    assert 1e-4 < found.exchange_seconds(bytes_GG) < 60


# --------------------------------------------------------------------------------------------------------------- trace


def test_a_model_is_traced_saved_merged_and_drawn(tmp_path: Path) -> None:
    path, picture = tmp_path / "trace.npz", tmp_path / "trace.png"
    name = "tests.test_placement_cli:routed"
    data = json.loads(run("trace", name, "--runs", "tests.test_placement_cli:steps", "--save", path, "--json").stdout)
    assert data["sigmas"] == [0.9, 0.5, 0.1]
    assert [layer["rows"] for layer in data["layers"]] == [90, 90]
    assert data["layers"][0]["kept_between_levels"] == 1.0, "a linear router ignores the scale"
    assert data["layers"][1]["in_four_successors"] is None
    twice = json.loads(run("trace", path, "--merge", path, "--json").stdout)
    assert [layer["rows"] for layer in twice["layers"]] == [180, 180]
    shown = run("trace", path, "--plot", picture).stdout
    assert "3 noise levels from 0.9 to 0.1" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "--runs" in run("trace", name, code=2).stderr
    assert "No such file" in run("trace", "none.npz", code=5).stderr
    assert ".png" in run("trace", path, "--plot", tmp_path / "trace.nothing", code=2).stderr


def test_drawn_traces_take_sizes(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    run("trace", "zipf", "--levels", "3", "--layers", "2", "--experts", "5", "--top-k", "1", "--save", path)
    trace = RoutingTrace.open(path)
    assert trace.load.shape == (3, 2, 5)
    assert "OptionError" in run("trace", "zipf", "--top-k", "99", "--json", code=2).stdout


# --------------------------------------------------------------------------------------------------------------- place


def test_a_plan_is_printed_saved_and_drawn(drawn: Path, tmp_path: Path) -> None:
    plan, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    shown = run(
        "place", drawn, "--on", "processes:2", *SIZES, "-s", "windows", "--save", plan, "--plot", picture
    ).stdout
    placed = Placement.open(plan)
    assert f"experts take {placed.slowdown:.3f} times a perfect balance" in shown
    assert "process0->process1" in shown
    assert "max/mean" in shown
    assert "<svg" in picture.read_text()
    data = json.loads(run("place", drawn, "--on", "processes:2", *SIZES, "-s", "windows", "--json").stdout)
    assert Placement.model_validate(data["placement"]) == placed
    seen = data["predicted"]
    assert len(seen["step_s"]) == 6
    assert seen["run_s"] == pytest.approx(sum(seen["step_s"]) + seen["setup_s"] + seen["moving_s"])
    assert min(seen["max_over_mean"]) >= 1


def test_all_strategies_are_compared_and_refusals_shown(drawn: Path) -> None:
    args = ("place", drawn, "--on", "node:2", *SIZES, "-s", "all", "--restarts", "1")
    data = json.loads(run(*args, "--json").stdout)["strategies"]
    assert {row["strategy"] for row in data} == {s.name for s in strategies()}
    assert not [row for row in data if "refused" in row]
    shown = run(*args, "--memory", "600kB").stdout
    assert "needs" in shown
    assert all(s.name in shown for s in strategies())


def test_a_model_gives_the_sizes(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    name = "tests.test_placement_cli:routed"
    run("trace", name, "--runs", "tests.test_placement_cli:steps", "--save", path)
    data = json.loads(run("place", path, "--model", name, "--json").stdout)
    experts = 2 * 2 * (8 * 16 + 16 * 8) * 4
    kept = 2 * 4 * 8 * 4
    biases = sum(p.nbytes for n, p in routed().named_parameters() if ".b_" in n and "b_out" not in n) // 2
    shared = sum(p.nbytes for n, p in routed().named_parameters() if "b_out" in n)
    assert data["predicted"]["memory_bytes"] == [experts + kept + biases + shared] * 2


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ((*SIZES, "-s", "minimax"), 2, "did you mean 'minimax_time'"),
        ((*SIZES, "--memory", "lots"), 2, "write it as 6GB"),
        ((*SIZES, "--memory", "100kB"), 2, "memory budget larger by"),
        ((*SIZES, "--on", "processes:9"), 2, "use at most 8 devices"),
        ((*SIZES, "-s", "eplb", "--spare", "7"), 2, "at most 2 copies, one per device"),
        ((*SIZES, "--seconds", "-1"), 2, "use positive numbers"),
        ((), 2, "--width and --hidden"),
        (("--model", "tests.test_placement_cli:routed"), 2, "collect a trace of this model"),
    ],
)
def test_plans_that_cannot_be_made(drawn: Path, args: tuple[str, ...], code: int, says: str) -> None:
    result = run("place", drawn, *args, code=code)
    assert says in result.stderr
    assert result.stdout == ""


def test_damaged_traces_are_refused(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(drawn.read_bytes()[:-40])
    assert "collect it again" in run("place", tmp_path / "cut.npz", *SIZES, code=5).stderr


def test_sizes_and_times_in_words() -> None:
    assert [parse_bytes(t) for t in ("6GB", "512MiB", "1.5k", "42")] == [6e9, 512 * 2**20, 1500, 42]
    with pytest.raises(OptionError):
        parse_bytes("6 gallons")
    assert [bytes_text(v) for v in (0, 1023, 2**20, float("inf"))] == ["0 B", "1023 B", "1 MiB", "-"]
    assert [seconds_text(v) for v in (0, 2e-9, 3e-6, 0.004, 5)] == ["0 s", "2 ns", "3 µs", "4 ms", "5 s"]


def test_place_writes_and_draws_the_schedule_of_a_step(tmp_path: Path) -> None:
    name, path = "tests.test_placement_cli:routed", tmp_path / "trace.npz"
    run("trace", name, "--runs", "tests.test_placement_cli:steps", "--save", path)
    args = ("place", path, "--on", "node:2", "--model", name, "--inputs", "tests.test_placement_cli:example")
    run(*args, "--schedule", tmp_path / "step.txt")
    lines = (tmp_path / "step.txt").read_text().splitlines()
    assert "bytes sent" in lines[0]
    roles = [
        line.split(">")[1].split()[0] for line in lines if ">count" in line or ">dispatch" in line or ">comb" in line
    ]
    assert roles == ["count", "dispatch", "combine"] * 2
    begins = [float(line.split()[0]) for line in lines[2:] if ">" in line[:40]]
    assert begins == sorted(begins)
    run(*args, "--schedule", tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().count("exchanging") == 2
    refused = run("place", path, "--width", 8, "--hidden", 16, "--schedule", tmp_path / "no.txt", code=2)
    assert "--model" in refused.stderr

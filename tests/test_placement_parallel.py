"""Expert parallelism over two gloo processes equals one process; refusals reach every rank."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import moefx
from examples import expert_parallel
from examples.dit import DiT
from moefx.errors import InputError, PlanError
from moefx.parallel import parallel_layers, parallelize
from moefx.passes.placement import Budget, ModelDims, RoutingTrace, Topology, place
from tests import placement_worker
from tests.ranks import run

RANKS = 2
EQUAL = {"double": 1e-12, "single": 1e-5}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("parallel") / "results.json"
    run(placement_worker.main, RANKS, out)
    read: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return read


@pytest.mark.parametrize(
    "scenario",
    [
        "double",
        "single",
        "over_a_mesh",
        "gated_ddp",
        "no_tokens_on_one_rank",
        "starved_rank",
        "rank_without_experts",
        "rank_without_gated_experts",
        "checkpointed",
        "compiled",
        "dropped_slots",
    ],
)
def test_two_processes_equal_one(results: dict[str, dict[str, Any]], scenario: str) -> None:
    bound = EQUAL.get(scenario, EQUAL["double"])
    assert results[scenario], "the scenario measured nothing"
    assert all(error <= bound for error in results[scenario].values()), results[scenario]


def test_no_tokens_anywhere_still_runs(results: dict[str, dict[str, Any]]) -> None:
    assert results["no_tokens_at_all"] == {"rows": 0.0}


def test_each_rank_holds_its_experts_only_and_checkpoints_fit_any_placement(results: dict[str, dict[str, Any]]) -> None:
    state = results["state"]
    assert state["output"] == 0.0
    width, hidden, experts = 12, 20, 6
    shared = 2 * (experts * width + width)  # router and output bias of two layers
    expert = 2 * width * hidden + hidden
    most = (3 + 4) * expert  # the larger share: three experts of one layer, four of the other
    assert state["held"] == shared + most


@pytest.mark.parametrize(
    ("reason", "says"),
    [
        ("world", "a placement on 3 devices, 2 processes"),
        ("layers", "without ['ffns.1']"),
        ("experts", "(3, 6) experts per layer"),
        ("dense", "no routed FFN"),
        ("one rank", "read the placement no placement"),
        ("plans", "the placements: rank 1 differs from rank 0"),
        ("weights", "the models' weights: rank 1 differs from rank 0"),
    ],
)
def test_a_refusal_reaches_every_rank(results: dict[str, dict[str, Any]], reason: str, says: str) -> None:
    for rank in range(RANKS):
        assert says in results["refusals"][f"{reason}@{rank}"]


def example(folder: Path) -> None:
    """Run the example as a rank, its output into a file."""
    with (folder / os.environ["RANK"]).open("w") as out, contextlib.redirect_stdout(out):
        assert expert_parallel.main([]) == 0


def test_the_example_ends_with_equality(tmp_path: Path) -> None:
    run(example, RANKS, tmp_path)
    printed = (tmp_path / "0").read_text().strip()
    assert printed.splitlines()[-1].startswith("2 processes equal one process"), printed


def routed_dit() -> torch.nn.Module:
    inputs = (torch.randn(2, 1, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2]))
    model: torch.nn.Module = moefx.transform(DiT(depth=2, width=16).eval(), inputs, experts=4, top_k=2, noise=0.1)
    return model


def test_without_a_running_job_the_error_says_torchrun() -> None:
    model = routed_dit()
    dims = ModelDims.of(model)
    trace = RoutingTrace(torch.ones(1).numpy(), dims.layers, dims.experts, torch.ones(1, 2, 4).numpy())
    placement = place(trace, Topology.processes(2), dims)
    with pytest.raises(InputError, match="torchrun"):
        parallelize(model, None, placement)
    with pytest.raises(PlanError, match="parallelize it first"):
        parallel_layers(model)


def test_sizes_are_those_of_the_model_and_memory_is_kept() -> None:
    model = routed_dit()
    dims = ModelDims.of(model)
    assert dims.layers == ("blocks.0.mlp", "blocks.1.mlp")
    expert_bytes = 4 * (16 * 64 * 2 + 64)
    assert dims.expert_bytes == (expert_bytes, expert_bytes)
    assert dims.shared_bytes + 8 * expert_bytes == sum(p.nbytes for p in model.parameters())
    trace = RoutingTrace(torch.ones(1).numpy(), dims.layers, dims.experts, torch.ones(1, 2, 4).numpy())
    enough = dims.shared_bytes + 4 * expert_bytes
    placed = place(trace, Topology.processes(2), dims, budget=Budget(memory_bytes=enough))
    assert placed.bytes_per_device(dims).tolist() == [enough, enough]
    with pytest.raises(PlanError, match="larger by 10 bytes"):
        place(trace, Topology.processes(2), dims, budget=Budget(memory_bytes=enough - 10))

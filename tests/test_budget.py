"""A target for active FLOPs: the choice against trying every one, what it makes, and the command line."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import moefx
from moefx.errors import InputError, PlanError
from tests.recipe_support import FLUX, MARKS, dense
from tests.recipe_support import inputs as given
from tests.split_support import batch, calibrated
from tests.test_cli import DIT, run
from tests.trace_support import tensors

pytestmark = MARKS
SMALL = {"experts": 6, "shared": 2, "top_k": 3}


def test_the_choice_is_the_best_of_all() -> None:
    model, calibration = calibrated()
    plan = moefx.plan(model, batch(0), budget=0.8, calibration=calibration, **SMALL)
    assert plan.recipe == "moefx-split"
    wide = moefx.plan(model, batch(0), recipe="moefx-split", **SMALL)
    assert plan.cost.flops_ratio <= 0.8
    chosen = {site.name: site.options["top_k"] for site in plan.sites}
    choices = []
    for site in wide.sites:
        taylor = calibration.layer(site.name).taylor
        tokens = 6 * 16  # six images of 8 x 8 in patches of 2 x 2
        squares = (taylor.second * taylor.count.unsqueeze(1)).sum(0) / taylor.count.sum()
        falling = sorted((squares * tokens).tolist(), reverse=True)
        found = [(None, 0.0, 0.0)]
        for k in range(1, 6):
            active = site.active_before * (2 + k) // 8 + 6 * 16
            found.append((k, 2.0 * (active - site.active_before) * tokens, sum(falling[8 * (2 + k) :])))
        choices.append(found)
    base = wide.cost.flops_before
    legal = [c for c in itertools.product(*choices) if base + sum(one[1] for one in c) <= 0.8 * base]
    best = min(legal, key=lambda c: sum(one[2] for one in c))
    assert chosen == {s.name: one[0] for s, one in zip(wide.sites, best, strict=True) if one[0] is not None}
    assert plan.expected_loss == pytest.approx(sum(one[2] for one in best))
    assert plan.cost.flops_after == pytest.approx(base + sum(one[1] for one in best), abs=2)
    assert f"({plan.cost.flops_ratio:.3f} of the dense model)" in str(plan)


def test_one_allocation_over_networks_heads_and_tokens() -> None:
    """Against every combination of one block, costs and losses written out by hand."""
    model, calibration = calibrated()
    given = batch(0)
    names = ["moefx-split", "moh", "mod"]
    request = {"recipe": names, "calibration": calibration, "every": 1, **SMALL}
    plan = moefx.plan(model, given, budget=0.65, only=["blocks.0", "blocks.0.*"], **request)
    assert plan.recipe == "moefx-split,mixture-of-heads,mixture-of-depths"
    tokens, width, hidden = 6 * 16, 16, 64
    taylor = calibration.layer("blocks.0.mlp").taylor
    neurons = ((taylor.second * taylor.count.unsqueeze(1)).sum(0) / taylor.count.sum() * tokens).tolist()
    heads = (calibration.part("blocks.0.attn").losses() * tokens).tolist()
    rows = (calibration.part("blocks.0").losses() * tokens).tolist()
    ffn, projections, scores = 2 * width * hidden, 4 * width * width, 2 * 16 * width
    embedding = 6 * width * width * 6  # the modulation of six images belongs to the block, and skips nothing by token
    block = 2 * (tokens * (ffn + projections + scores) + embedding)
    best = (float("inf"), 0.0, ())
    base = plan.cost.flops_before
    for k, on, kept in itertools.product([None, 1, 2, 3, 4, 5], [None, 1], [None, *range(1, 8)]):
        flops = loss = 0.0
        if k is not None:
            flops += 2 * tokens * (ffn * (2 + k) // 8 + 6 * width - ffn)
            loss += sum(sorted(neurons, reverse=True)[8 * (2 + k) :])
        if on is not None:
            flops += 2 * tokens * (2 * width - (width * width * 2 + scores) / 2)
            loss += min(heads)
        if kept is not None:
            flops = flops * kept / 8 - block * (1 - kept / 8) + 2 * tokens * width
            loss = loss * kept / 8 + sum(rows[2 * kept :])
        if base + flops <= 0.65 * base + 1e-6:
            best = min(best, (loss, flops, (k, on, kept)))
    k, on, kept = best[2]
    found = {s.kind: s.options for s in plan.sites}
    assert found.get("ffn", {}).get("top_k") == k
    assert found.get("attention", {}).get("active_heads") == on
    assert found.get("block", {}).get("capacity") == (None if kept is None else kept / 8)
    assert plan.expected_loss == pytest.approx(best[0])
    assert plan.cost.flops_after == pytest.approx(base + best[1], abs=2)
    tight = moefx.plan(model, given, budget=0.4, **request)
    assert {s.rule for s in tight.sites} == {"split", "mixture-of-heads", "mixture-of-depths"}
    routed = moefx.transform(copy.deepcopy(model), given, budget=0.4, verify=False, **request)
    assert routed.moefx.report.plan.cost == tight.cost
    for site in tight.sites:
        if site.rule == "mixture-of-depths":
            assert routed.get_submodule(site.name).token_router.capacity == site.options["capacity"]
    assert routed(*given).isfinite().all()


def test_where_two_rewrites_exclude_each_other_one_is_chosen() -> None:
    """FLUX's double blocks: a pass by token writes out the attention whose heads another would gate."""
    model, inputs = dense(FLUX), given(FLUX)
    found = moefx.calibrate(model, [inputs], loss=lambda y, _: tensors(y)[0].square().mean(), progress=False)
    request = {"recipe": ["moh", "mod"], "calibration": found, "every": 1}
    with pytest.raises(PlanError, match="mixture-of-heads first"):
        moefx.plan(model, inputs, **{**request, "calibration": None})
    plan = moefx.plan(model, inputs, budget=0.75, **request)
    assert {s.rule for s in plan.sites} == {"mixture-of-heads", "mixture-of-depths"}
    double = [s for s in plan.sites if s.name.startswith("transformer_blocks.")]
    assert len({s.name.split(".")[1] for s in double}) == len(double) > 0
    routed = moefx.transform(copy.deepcopy(model), inputs, budget=0.75, verify=False, **request)
    assert all(bool(t.isfinite().all()) for t in tensors(routed(**inputs)))


def test_heads_by_the_timestep_are_chosen_with_a_calibration() -> None:
    model, calibration = calibrated()
    plan = moefx.plan(model, batch(0), recipe="dydit", budget=0.6, calibration=calibration)
    assert plan.cost.flops_ratio <= 0.6
    assert {"mixture-of-heads", "channel-groups"} == {s.rule for s in plan.sites}
    assert len({s.options["budget"] for s in plan.sites}) > 1
    energy = moefx.calibrate(model, [batch(0)], buckets=2, samples=500, progress=False)
    by_energy = moefx.plan(model, batch(0), recipe="dydit", budget=0.6, calibration=energy)
    assert by_energy.cost.flops_ratio <= 0.6
    assert "has no loss" in by_energy.warnings[-1]
    assert not plan.warnings


def test_a_transform_within_the_budget_is_saved_with_its_ratios(tmp_path: Path) -> None:
    dense, calibration = calibrated()
    model = moefx.transform(copy.deepcopy(dense), batch(0), budget=0.85, calibration=calibration, **SMALL)
    plan = model.moefx.report.plan
    assert plan.cost.flops_ratio <= 0.85
    layers = {site.options["top_k"]: model.get_submodule(site.name) for site in plan.sites}
    for layer in layers.values():
        layer.record.assigned.zero_()
    for i in range(4):
        model(*batch(i))
    for top_k, layer in layers.items():  # the thresholds were set on these very tokens
        assert float(layer.record.assigned.sum()) / (4 * 6 * 16) == pytest.approx(top_k, abs=0.6)
    moefx.save(model, tmp_path / "m")
    again = moefx.load(tmp_path / "m", copy.deepcopy(dense))
    assert torch.equal(again(*batch(1)), model(*batch(1)))


def test_impossible_requests() -> None:
    model, calibration = calibrated()
    with pytest.raises(PlanError, match="at its smallest the model keeps 0"):
        moefx.plan(model, batch(0), budget=0.1, calibration=calibration, **SMALL)
    with pytest.raises(InputError, match="no calibration"):
        moefx.plan(model, batch(0), budget=0.5)
    with pytest.raises(InputError, match="no share"):
        moefx.plan(model, batch(0), budget=1.5, calibration=calibration)
    with pytest.raises(PlanError, match="use recipes that split"):
        moefx.plan(model, batch(0), recipe="sparse-upcycling", budget=0.5, calibration=calibration)
    own = moefx.plan(model, batch(0), recipe="dydit-tokens", budget=0.7)
    assert own.passes[0].options["budget"] == 0.7


def test_the_command_line(tmp_path: Path) -> None:
    file, folder = str(tmp_path / "c.safetensors"), str(tmp_path / "out")
    made = json.loads(run("calibrate", DIT, "--synthetic", "2", "--out", file, "--json", "-q").stdout)
    assert made["format"] == "moefx.calibration"
    assert all(layer["tokens"] == layer["kept"] > 0 for layer in made["layers"].values())
    options = ["--calibration", file, "--budget", "0.8", "-o", "experts=6", "-o", "shared=2", "-o", "top_k=3"]
    plan = json.loads(run("plan", DIT, *options, "--json", "-q").stdout)["plan"]
    assert plan["cost"]["flops_after"] <= 0.8 * plan["cost"]["flops_before"]
    assert "moefx-split" in run("plan", DIT, *options, "-q").stdout
    composed = ["--recipe", "moefx-split,moh,mod", *options[:2], "--budget", "0.45", *options[4:], "-o", "every=1"]
    plan = json.loads(run("plan", DIT, *composed, "--json", "-q").stdout)["plan"]
    assert {site["rule"] for site in plan["sites"]} >= {"split", "mixture-of-depths"}
    assert plan["cost"]["flops_after"] <= 0.45 * plan["cost"]["flops_before"]
    text = run("plan", DIT, *composed, "-q").stdout
    assert "capacity=" in text
    assert "expected loss" in text
    plan = json.loads(run("plan", DIT, *options, "--json", "-q").stdout)["plan"]
    receipt = json.loads(run("transform", DIT, *options, "--out", folder, "--json", "-q").stdout)
    assert receipt["report"]["plan"]["sites"] == plan["sites"]
    assert "no data" in run("calibrate", DIT, "--out", file, code=2).stderr
    own = ["--batches", "tests.cli_models:batches", "--loss", "tests.cli_models:squares"]
    assert "2 layers" in run("calibrate", DIT, *own, "--out", file, "-q").stdout
    name = "transformer_blocks.0"
    assert moefx.Calibration.load(file).part(name).learnt
    run("transform", DIT, "--recipe", "moefx-split", "--out", folder, code=2)
    run("plan", DIT, "--budget", "0.5", "--calibration", str(tmp_path / "no"), code=5)

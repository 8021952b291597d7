"""``moefx.bisection``: the first site that makes a model wrong is named, and the model left as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moefx
from examples.dit import DiT
from moefx.bisection import bisect
from moefx.cli import app
from moefx.errors import InputError
from moefx.routing import RoutedFFN

DEPTH = 5


@pytest.fixture
def model() -> DiT:
    return DiT(image_size=4, patch=2, in_channels=3, depth=DEPTH, width=16, heads=2, classes=5).eval()


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 4, 4), torch.tensor([10.0, 900.0]), torch.tensor([1, 2])


def routed(model: nn.Module) -> list[int]:
    return [int(name.split(".")[1]) for name, module in model.named_modules() if isinstance(module, RoutedFFN)]


@pytest.mark.parametrize("culprit", [0, 2, DEPTH - 1])
def test_the_first_wrong_site_is_found_in_few_steps(model: DiT, culprit: int) -> None:
    before, tried = {k: v.clone() for k, v in model.state_dict().items()}, []

    def wrong(found: nn.Module) -> str | None:
        tried.append(routed(found))
        return "a block that must stay dense" if culprit in tried[-1] else None

    found = bisect(model, inputs(), wrong=wrong, recipe="sparse-upcycling", experts=2, top_k=1)
    assert found is not None
    assert f"blocks.{culprit}.mlp" in found.site
    assert (found.index, found.sites, found.reason) == (culprit, DEPTH, "a block that must stay dense")
    assert len(tried) <= 5, "the dense model, all sites, and three halvings of five"
    assert all(blocks == list(range(len(blocks))) for blocks in tried), "always the first ones"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_broken_contract_needs_no_check_of_ones_own(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefx.model import verify

    exact = verify.check_sites

    def broken(built: Any, seed: int) -> Any:
        checks = exact(built, seed)
        for made in built:
            if "blocks.3" in made.plan.name:
                raise moefx.errors.VerifyError(f"prove {made.plan.name}", found="error 0.5", do="look")
        return checks

    monkeypatch.setattr("moefx.model.transform.check_sites", broken)
    found = bisect(model, inputs(), experts=2, top_k=1)
    assert found is not None
    assert found.index == 3
    assert "error 0.5" in str(found)


def test_a_right_rewrite_has_no_culprit_and_wrong_starts_are_refused(model: DiT) -> None:
    assert bisect(model, inputs(), experts=2, top_k=1) is None
    with pytest.raises(InputError, match="the dense model is wrong: always"):
        bisect(model, inputs(), wrong=lambda _: "always", experts=2, top_k=1)
    moefx.transform(model, inputs(), experts=2, top_k=1)
    with pytest.raises(InputError, match="transformed model"):
        bisect(model, inputs(), experts=2, top_k=1)


def test_the_command() -> None:
    own = ("bisect", "diffusers:DiTTransformer2DModel", "--recipe", "sparse-upcycling", "-o", "experts=2")
    whole = CliRunner().invoke(app, [*own])
    assert (whole.exit_code, whole.stdout) == (0, "no site is wrong\n")
    off = CliRunner().invoke(app, [*own, "-o", "noise=0.5", "--error", "1e-6", "--json"])
    culprit = json.loads(off.stdout)["culprit"]
    assert (culprit["index"], culprit["sites"]) == (0, 2)
    assert culprit["reason"].startswith("relative error ")

"""The digits demo from the command line to its files, in a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import digits
from examples.digits_demo import pipeline, sparse
from examples.digits_demo.config import Config
from examples.digits_demo.cost import cost
from examples.digits_demo.data import load


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run once; the tests read what it left."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    assert digits.main(["--out", str(folder), "--steps", "3"]) == 0
    torch.set_num_threads(threads)
    return folder, json.loads((folder / "report.json").read_text())


def test_all_files_are_there_and_nothing_else(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = demo
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if not name.startswith("dense-")} == set(facts["files"]) == set(pipeline.FILES)
    assert len(names) == len(pipeline.FILES) + 1


def test_conversion_is_exact_at_equal_active_flops(demo: tuple[Path, dict[str, Any]]) -> None:
    _, facts = demo
    dense, routed = facts["cost"]["dense"], facts["cost"]["routed"]
    assert facts["equality"]["max_relative_error"] <= 1e-5
    assert len(facts["equality"]["max_relative_error_by_time"]) >= 3
    assert routed["parameters"] > 1.5 * dense["parameters"]
    assert 1 <= routed["flops_per_image"] / dense["flops_per_image"] < 1.04  # the routers
    assert 1 <= routed["active_parameters"] / dense["active_parameters"] < 1.04


def test_the_same_noise_gives_the_same_loss_before_training(demo: tuple[Path, dict[str, Any]]) -> None:
    losses = demo[1]["validation_loss"]
    assert losses["routed"]["by_bucket"] == pytest.approx(losses["dense"]["by_bucket"], rel=1e-5)
    assert losses["routed_tuned"]["mean"] < losses["dense"]["mean"]
    assert losses["dense_tuned"]["mean"] != losses["routed_tuned"]["mean"]


def test_expert_loads_are_shares(demo: tuple[Path, dict[str, Any]]) -> None:
    experts = demo[1]["experts"]
    assert len(experts) == demo[1]["config"]["model"]["depth"]
    for layer in experts:
        assert len(layer["load"]) == demo[1]["config"]["routing"]["experts"]
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-5)


def test_the_report_shows_its_pictures_and_numbers(demo: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = demo
    text = (folder / "report.md").read_text()
    linked = re.findall(r"\]\(([\w.]+)\)", text)
    assert set(linked) >= {"samples.png", "loss_curves.png", "expert_utilisation.png", "graph_before.txt"}
    assert all((folder / name).exists() for name in linked)
    assert f"{facts['validation_loss']['routed_tuned']['mean']:.4f}" in text
    assert "It is not FID" in text


def test_graphs_show_the_experts_only_afterwards(demo: tuple[Path, dict[str, Any]]) -> None:
    before, after = ((demo[0] / f"graph_{when}.txt").read_text() for when in ("before", "after"))
    assert "mlp" in before
    assert "mlp" in after
    assert before != after


def test_a_second_run_uses_the_dense_weights_and_gets_the_same_numbers(
    demo: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, facts = demo
    threads = torch.get_num_threads()
    assert digits.main(["--out", str(folder), "--steps", "3", "--json"]) == 0
    torch.set_num_threads(threads)
    again = json.loads(capsys.readouterr().out)
    assert again["dense_from_cache"]
    assert not facts["dense_from_cache"]
    assert again["validation_loss"] == facts["validation_loss"]
    assert again["samples"] == facts["samples"]


def test_an_interrupted_run_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "finetune", interrupt)
    assert digits.main(["--out", str(tmp_path), "--steps", "1"]) == 130
    assert not (tmp_path / "report.md").exists()


def test_a_model_that_differs_is_refused() -> None:
    data = load(0.2, seed=0)
    torch.manual_seed(0)
    one, other = (torch.nn.Conv2d(1, 1, 1) for _ in range(2))
    first, second = of_images(one), of_images(other)
    with pytest.raises(SystemExit, match="differs from the dense one by"):
        sparse.prove_equal(first, second, data)
    assert sparse.prove_equal(first, first, data)["max_relative_error"] == 0


def of_images(layer: torch.nn.Module) -> torch.nn.Module:
    """A model of images that ignores time and label."""

    class Stub(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> Any:
            return self.layer(x)

    return Stub()


def test_routed_cost_counts_chosen_experts_and_the_router() -> None:
    from moefx.routing import Experts, FFNWeights, LinearRouter, RoutedFFN

    experts = Experts(FFNWeights(w_in=torch.zeros(8, 6, 4), w_out=torch.zeros(8, 4, 6)), torch.nn.GELU())
    layer = RoutedFFN(LinearRouter(4, 8), experts, top_k=2)
    found = cost(layer, (torch.randn(5, 4),))
    assert found.flops_per_image == 2 * 5 * (2 * (6 * 4 + 4 * 6) + 4 * 8)
    assert found.parameters == 8 * 48 + 32
    assert found.active_parameters == 2 * 48 + 32


def test_the_defaults_keep_active_width_equal() -> None:
    assert Config().routing.top_k == 1

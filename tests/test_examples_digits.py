"""The parts of the digits demo: data, path, training, judge, cost, files, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from examples import digits
from examples.digits_demo import dense, judge, plots, train
from examples.digits_demo.config import Config, StageConfig, dense_key
from examples.digits_demo.cost import cost
from examples.digits_demo.data import Digits, load
from examples.digits_demo.files import replacing, write_text
from examples.digits_demo.flow import Batch, inputs, sample, velocity_errors
from examples.dit import DiT

STAGE = StageConfig(steps=4, learning_rate=4e-3, warmup_steps=1, batch=32, evaluate_every=2)


@pytest.fixture(scope="module")
def data() -> Digits:
    return load(0.2, seed=0)


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return DiT(depth=1, width=16, heads=2, label_dropout=0.0)


class Oracle(nn.Module):
    """Knows that every image is the same one, and so the exact velocity."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x - self.image) / (t / 1000).clamp(min=1e-6).view(-1, 1, 1, 1)


def test_the_split_is_stratified_and_repeatable(data: Digits) -> None:
    assert len(data.train_x) + len(data.validation_x) == 1797
    assert data.train_x.min() == -1
    assert data.train_x.max() == 1
    counts = torch.bincount(data.validation_y, minlength=10)
    assert counts.min() >= 34
    assert counts.max() <= 37
    again = load(0.2, seed=0)
    assert torch.equal(again.validation_x, data.validation_x)
    assert not torch.equal(load(0.2, seed=1).validation_x, data.validation_x)


def test_the_path_ends_at_data_and_at_noise(data: Digits) -> None:
    noise = torch.randn_like(data.validation_x)
    for time, end in ((0.0, data.validation_x), (1.0, noise)):
        x, t, _ = inputs(Batch(data.validation_x, data.validation_y, torch.full((360,), time), noise))
        torch.testing.assert_close(x, end)
        assert (t == 1000 * time).all()


def test_the_exact_velocity_has_no_error_and_samples_the_image(data: Digits) -> None:
    image = data.train_x[:1]
    oracle = Oracle(image)
    batch = Batch(image.expand(5, -1, -1, -1), torch.zeros(5), torch.linspace(0.1, 1, 5), torch.randn(5, 1, 8, 8))
    assert velocity_errors(oracle, batch).max() < 1e-8
    drawn = sample(oracle, torch.zeros(3, dtype=torch.long), 10, steps=4, guidance=2.0, seed=0)
    torch.testing.assert_close(drawn, image.expand(3, -1, -1, -1), atol=1e-4, rtol=0)


def test_guidance_extrapolates_from_the_null_class() -> None:
    class ByLabel(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return torch.where(y == 10, 0.0, -0.1).view(-1, 1, 1, 1).expand_as(x)

    zero = torch.zeros(1, dtype=torch.long)
    plain, guided = (sample(ByLabel(), zero, 10, steps=2, guidance=g, seed=0) for g in (1.0, 3.0))
    inside = (guided.abs() < 1) & (plain.abs() < 1)  # samples are clipped to the range of pixels
    assert inside.sum() > 20
    torch.testing.assert_close((guided - plain)[inside], torch.full_like(plain, 0.2)[inside])


def test_side_by_side_training_gives_each_model_what_it_gets_alone(data: Digits, model: DiT) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def fresh() -> train.Trainee:
        made = DiT(depth=1, width=16, heads=2, label_dropout=0.0)
        made.load_state_dict(state)
        return train.Trainee(made, STAGE)

    alone, first, second = fresh(), fresh(), fresh()
    train.train([alone], data, STAGE, 10, 0, "")
    train.train([first, second], data, STAGE, 10, 0, "")
    assert alone.curve.train == first.curve.train == second.curve.train
    assert alone.curve.validation == first.curve.validation
    assert alone.curve.validation_steps == [0, 2, 4]
    assert alone.curve.train[0] != alone.curve.train[-1]


def test_a_penalty_is_trained_on_but_not_reported(data: Digits, model: DiT) -> None:
    batch = train.draw(data, STAGE, 10, torch.Generator().manual_seed(0))
    expected = velocity_errors(model, batch).mean().item()
    weight = model.blocks[0].get_parameter("mlp.fc1.weight")
    before = weight.detach().clone()
    trainee = train.Trainee(model, STAGE, lambda *_: weight.square().sum())
    trainee.step(batch)
    assert trainee.curve.train == [pytest.approx(expected)]
    assert not torch.equal(weight, before)


def test_labels_are_dropped_at_the_asked_rate(data: Digits) -> None:
    stage = dataclasses.replace(STAGE, batch=4000, label_dropout=0.25)
    batch = train.draw(data, stage, 10, torch.Generator().manual_seed(0))
    assert 0.22 < (batch.y == 10).float().mean() < 0.28
    assert batch.t.min() > 0
    assert batch.t.max() < 1


def test_the_average_is_lent_and_taken_back(model: DiT) -> None:
    trainee = train.Trainee(model, STAGE)
    live = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in trainee.average.live:
            parameter.add_(1.0)
    trainee.average.update()
    moved = [parameter.detach().clone() for parameter in model.parameters()]
    with trainee.averaged() as lent:
        assert not lent.training
        for before, mean, after in zip(live, lent.parameters(), moved, strict=True):
            share = 9 / 11  # 1 - (1 + 1) / (10 + 1)
            torch.testing.assert_close(mean, before + share * (after - before))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), moved, strict=True))


def test_learning_rate_warms_up_and_decays() -> None:
    stage = dataclasses.replace(STAGE, steps=100, warmup_steps=10)
    rates = [train.cosine(step, stage) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def test_frechet_distance_of_gaussians_matches_its_formula() -> None:
    draws = np.random.default_rng(0).standard_normal((200_000, 3))
    shifted = 2 * draws + np.array([1.0, 0.0, 0.0])
    assert judge.frechet(draws, draws) == pytest.approx(0, abs=1e-6)
    assert judge.frechet(draws, shifted) == pytest.approx(1 + 3 * (2 - 1) ** 2, rel=0.02)


def test_wilson_interval_of_a_known_case() -> None:
    assert judge.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert judge.wilson(10, 10)[1] == 1


def test_the_judge_knows_digits_from_noise(data: Digits) -> None:
    scores = judge.Judge(data, Config().judge).yardsticks()
    assert scores["real_validation"]["knn_share"] > 0.95
    assert scores["noise"]["knn_share"] < 0.2
    assert scores["noise"]["pca_frechet_distance"] > 10 * scores["real_validation"]["pca_frechet_distance"]


def test_bucket_errors_are_paired_and_ordered(data: Digits, model: DiT) -> None:
    asked = dataclasses.replace(Config().judge, timestep_buckets=3, draws_per_bucket=1)
    errors = judge.bucket_errors(model.eval(), data, asked, seed=0)
    assert errors.shape == (3, 360)
    assert torch.equal(errors, judge.bucket_errors(model, data, asked, seed=0))
    gap = judge.paired_difference(errors + 0.5, errors)
    assert gap["mean"] == pytest.approx(0.5, rel=1e-5)
    assert gap["standard_error"] == pytest.approx(0, abs=1e-6)


def test_dense_cost_is_the_sum_over_its_layers() -> None:
    model = DiT(depth=2, width=32, heads=4, classes=10)
    found = cost(model, (torch.randn(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)))
    tokens, width = 16, 32
    block = tokens * (3 * width**2 + width**2 + 8 * width**2) + 2 * tokens**2 * width + 6 * width**2
    outer = tokens * 4 * width + 256 * width + width**2 + 2 * width**2 + tokens * 4 * width
    assert found.flops_per_image == 2 * (2 * block + outer)
    assert found.parameters == found.active_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_dense_weights_are_read_back_and_keyed_by_every_choice(data: Digits, tmp_path: Path) -> None:
    config = Config().shortened(2)
    model, curve, cached = dense.trained(config, data, tmp_path, fresh=False)
    again, same_curve, cached_again = dense.trained(config, data, tmp_path, fresh=False)
    assert (cached, cached_again) == (False, True)
    assert curve == same_curve
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == [f"dense-{dense_key(config)}.safetensors"]
    changed = [
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, model=dataclasses.replace(config.model, width=48)),
        dataclasses.replace(config, dense=dataclasses.replace(config.dense, learning_rate=1.0)),
    ]
    assert len({dense_key(each) for each in [config, *changed]}) == 4
    assert dense_key(dataclasses.replace(config, finetune=changed[2].dense)) == dense_key(config)


def test_a_damaged_dense_file_is_named(data: Digits, tmp_path: Path) -> None:
    config = Config().shortened(1)
    path = tmp_path / f"dense-{dense_key(config)}.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(SystemExit, match=r"dense-.* is damaged .*--fresh"):
        dense.trained(config, data, tmp_path, fresh=False)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    write_text(path, "old")

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_written(data: Digits, tmp_path: Path) -> None:
    curve = train.Curve([1.0, 0.9, 0.8, 0.7], [1, 4], [1.0, 0.7], 1.0)
    plots.loss_curves(tmp_path / "a.png", curve, curve, curve, 1.0)
    plots.sample_sheet(tmp_path / "b.png", {"one": data.validation_x[:30], "two": data.validation_x[:30]}, 10)
    plots.utilisation(tmp_path / "c.png", torch.full((2, 4, 8), 1 / 8), ["first", "second"])
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_impossible_step_counts_are_usage_errors(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        digits.main(["--steps", steps])
    assert stopped.value.code == 2
    assert "above 0" in capsys.readouterr().err


def test_configuration_is_plain_data() -> None:
    assert json.loads(json.dumps(Config().as_dict()))["routing"]["experts"] == Config().routing.experts

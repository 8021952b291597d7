"""The spine in seconds, for pre-commit: transform a small DiT, compare, train a step, undo, dump."""

import torch
from typer.testing import CliRunner

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros


def test_the_spine() -> None:
    model = randomise_zeros(DiT(image_size=8, patch=2, in_channels=3, depth=2, width=32, heads=4, classes=5)).eval()
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([10.0, 900.0]), torch.tensor([1, 2]))
    dense = model(*inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    routed = moefx.transform(model, inputs, experts=4, top_k=2)
    assert routed is model
    assert set(routed.state_dict()) != set(before)
    torch.testing.assert_close(routed(*inputs), dense, rtol=1e-4, atol=1e-5)

    (routed(*inputs).square().mean() + moefx.aux_loss(routed)).backward()
    moefx.untransform(routed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_command_answers() -> None:
    from moefx.cli import app

    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("dump", "sites", "plan", "transform", "verify", "recipes", "doctor"):
        assert command in result.output

"""Channel windows: the published offsets, the equation on whole models, and nothing lost on the way."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import NothingMatched, OptionError
from moefx.graph.inputs import synthesise
from moefx.routing.windows import ChannelWindow

FLUX = "FluxTransformer2DModel"
NAMES = ["DiTTransformer2DModel", "SD3Transformer2DModel", FLUX, "WanTransformer3DModel", "CogVideoXTransformer3DModel"]


def test_the_published_offsets() -> None:
    window = ChannelWindow(1152)
    assert window.size == 921
    masks = window(torch.zeros(1), torch.tensor([0, 250, 500, 750, 999]))
    assert masks.shape == (5, 1, 1152)
    assert masks.sum(-1).flatten().tolist() == [921] * 5
    assert masks.argmax(-1).flatten().tolist() == [0, 1, 14, 73, 231]
    assert all(mask.diff().abs().sum() <= 2 for mask in masks[:, 0])  # one run of channels


def test_units_and_limits() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    by_steps, by_sigma = ChannelWindow(64), ChannelWindow(64, last_timestep=1.0)
    t = torch.linspace(0, 999, 50)
    assert torch.equal(by_steps(x, t), by_sigma(x, t / 999))
    assert by_steps(x, t).dtype == torch.float64
    assert torch.equal(by_steps(x, torch.tensor([-5.0, 2000.0])), by_steps(x, torch.tensor([0.0, 999.0])))
    assert torch.equal(by_steps(x, torch.tensor(7.0)), by_steps(x, torch.tensor([7.0])))
    assert torch.equal(ChannelWindow(64, share=1.0)(x, t), torch.ones(50, 1, 64, dtype=torch.float64))
    for options in ({"share": 0.001}, {"alpha": 0.0}, {"last_timestep": 0.0}):
        with pytest.raises(OptionError, match="no such window"):
            ChannelWindow(64, **options)


class Written(nn.Module):
    """The equation around one block of the example transformer, for models in which each block gets t by hand."""

    def __init__(self, block: nn.Module, time: list[Tensor]) -> None:
        super().__init__()
        self.block, self.time = block, time

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        width = x.shape[-1]
        size = int(0.8 * width)
        mask = torch.zeros(x.shape[0], 1, width, dtype=x.dtype)
        for b, t in enumerate(self.time[0].tolist()):
            start = round((t / 999) ** 4 * (width - size))
            mask[b, :, start : start + size] = 1
        seen: Tensor = self.block(x * mask, c)
        return seen + (1 - mask) * x


def test_a_model_follows_the_equation_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    inputs = (torch.randn(3, 1, 8, 8).double(), torch.tensor([20.0, 600, 990]).double(), torch.tensor([3, 7, 0]))
    by_hand = copy.deepcopy(model)
    by_hand.blocks = nn.ModuleList([Written(block, [inputs[1]]) for block in by_hand.blocks])
    moefx.transform(model, inputs, recipe="dtr")
    found, wanted = model(*inputs), by_hand(*inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    others = {name.replace(".block.", "."): p.grad for name, p in by_hand.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_models_are_masked_and_equal_with_all_channels(name: str) -> None:
    dense = zoo.tiny(name)
    last = 1.0 if name == FLUX else 999.0
    inputs = synthesise(dense, batch=3, seed=9)
    whole = moefx.transform(copy.deepcopy(dense), recipe="dtr", share=1.0, last_timestep=last)
    with torch.no_grad():
        wanted = dense(**inputs)[0]
        torch.testing.assert_close(whole(**inputs)[0], wanted, rtol=1e-6, atol=1e-6)
        masked = moefx.transform(copy.deepcopy(dense), recipe="dtr", last_timestep=last)
        assert (masked(**inputs, return_dict=False)[0] - wanted).abs().max() > 1e-3
    assert set(masked.state_dict()) == set(dense.state_dict())


def test_a_sample_does_not_depend_on_its_batch() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    x, t, y = torch.randn(3, 1, 8, 8).double(), torch.tensor([20.0, 600, 990]).double(), torch.tensor([3, 7, 0])
    moefx.transform(model, (x, t, y), recipe="dtr")
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), rtol=1e-10, atol=1e-12)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, recipe="dtr", share=0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(moefx.load(tmp_path)(**inputs)[0], model(**inputs)[0])


def test_blocks_out_of_sight_are_named() -> None:
    with pytest.raises(NothingMatched, match="not called by the forward"):
        moefx.plan(zoo.tiny("UNet2DConditionModel"), recipe="dtr")

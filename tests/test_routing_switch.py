"""Two models behind one boundary against calling the right one."""

import copy

import pytest
import torch

from moefx import zoo
from moefx.errors import InputError
from moefx.graph.inputs import synthesise
from moefx.routing.switch import TimestepSwitch


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, flag: bool = True) -> tuple[torch.Tensor, float]:
        self.calls += 1
        return x * self.factor, 1.0


def test_one_side_runs_one_model() -> None:
    switch = TimestepSwitch(Scale(2.0), Scale(3.0), 875.0)
    x = torch.randn(4, 2).double()
    assert torch.equal(switch(x, torch.full((4,), 875.0))[0], x * 2)
    assert torch.equal(switch(x, timestep=torch.tensor(874.9))[0], x * 3)
    assert torch.equal(switch(x, timestep=900)[0], x * 2)
    assert (switch.high_noise_model.calls, switch.low_noise_model.calls) == (2, 1)
    assert (switch.side(875), switch.side(874)) == ("high", "low")


def test_a_mixed_batch_equals_each_sample_alone() -> None:
    switch = TimestepSwitch(Scale(2.0), Scale(3.0), 500.0)
    x, t = torch.randn(5, 3).double(), torch.tensor([1.0, 999, 500, 499, 700])
    y = switch(x, t)[0]
    for i in range(5):
        assert torch.equal(y[i : i + 1], switch(x[i : i + 1], t[i : i + 1])[0])
    y.sum().backward()
    torch.testing.assert_close(switch.high_noise_model.factor.grad, x[[1, 2, 4]].sum())
    torch.testing.assert_close(switch.low_noise_model.factor.grad, x[[0, 3]].sum())


def test_a_fixed_side_needs_no_timestep_and_compiles_whole() -> None:
    switch = TimestepSwitch(Scale(2.0), Scale(3.0), 500.0)
    x, t = torch.randn(2, 3).double(), torch.tensor([1.0, 1.0])
    compiled = torch.compile(switch, fullgraph=True, backend="eager")
    with switch.fixed("high"):
        assert torch.equal(compiled(x, t)[0], x * 2)
    with switch.fixed("low"):
        assert torch.equal(compiled(x, t)[0], x * 3)
    assert torch.equal(switch(x, t)[0], x * 3)


def test_a_video_model_with_its_copy() -> None:
    high = zoo.tiny("WanTransformer3DModel")
    low = copy.deepcopy(high)
    torch.nn.init.normal_(low.proj_out.weight, std=0.1)
    switch = TimestepSwitch(high, low, 875.0)
    inputs = synthesise(high, batch=2) | {"timestep": torch.tensor([900, 100])}
    with torch.no_grad():
        mixed = switch(**inputs).sample
        assert torch.equal(mixed[0], high(**inputs).sample[0])
        assert torch.equal(mixed[1], low(**inputs).sample[1])


def test_a_boundary_belongs_to_a_shift() -> None:
    def steps_of_the_high_model(shift: float) -> int:
        sigmas = torch.tensor([1 - i / 30 for i in range(30)], dtype=torch.float64)
        shifted = shift * sigmas / (1 + (shift - 1) * sigmas)
        switch = TimestepSwitch(Scale(2.0), Scale(3.0), 900.0)
        return sum(switch.side(1000 * t) == "high" for t in shifted.tolist())

    assert (steps_of_the_high_model(1.0), steps_of_the_high_model(12.0)) == (4, 18)


def test_a_call_without_a_timestep_is_refused() -> None:
    switch = TimestepSwitch(Scale(2.0), Scale(3.0), 500.0, argument="sigma")
    with pytest.raises(InputError, match="name the argument"):
        switch(torch.ones(1), torch.ones(1))

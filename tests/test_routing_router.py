"""The linear router: what it reads and the precision it reads it in."""

import copy

import pytest
import torch

from moefx.errors import InputError, OptionError
from moefx.routing import LinearRouter, sinusoidal


def test_logits_are_the_linear_map_of_token_and_tap_side_by_side() -> None:
    router = LinearRouter(6, 4, tap_dim=3, bias=True).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x, c = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    side_by_side = torch.cat([x, c[:, None].expand(2, 5, 3)], dim=-1)
    expected = side_by_side @ torch.cat([router.weight, router.tap_weight], dim=1).T + router.bias
    torch.testing.assert_close(router(x, c), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(router(x, c[:, None].expand(2, 5, 3)), expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(router(x[0], c[0]), expected[0], rtol=1e-13, atol=1e-13)
    image = x.reshape(2, 5, 1, 6)
    torch.testing.assert_close(router(image, c), expected.unsqueeze(2), rtol=1e-13, atol=1e-13)


def test_a_new_tap_changes_nothing_until_it_is_trained() -> None:
    router = LinearRouter(6, 4, tap_dim=3, bias=True)
    x, c = torch.randn(2, 5, 6), torch.randn(2, 3)
    assert torch.equal(router(x, c), x @ router.weight.T)
    router(x, c).square().sum().backward()
    assert router.tap_weight.grad.abs().max() > 0


def test_start_is_normal_with_the_given_deviation_and_seed() -> None:
    one, two = (LinearRouter(512, 64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert abs(float(one.weight.detach().std()) - 0.02) < 1e-3
    assert LinearRouter(512, 64, std=0).weight.count_nonzero() == 0


def test_raw_timesteps_are_embedded_like_diffusers_does() -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    layer = embeddings.Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    t = torch.tensor([0.0, 1.0, 250.5, 999.0])
    torch.testing.assert_close(sinusoidal(t, 256), layer(t), rtol=0, atol=1e-6)
    torch.testing.assert_close(sinusoidal(t / 1000, 256, scale=1000), layer(t), rtol=0, atol=2e-4)


@pytest.mark.parametrize("t", [torch.tensor([3, 999]), torch.tensor([3.0, 999.0]), torch.tensor([3.0, 999.0]).half()])
def test_a_raw_timestep_is_read_as_one_decision_per_sample(t: torch.Tensor) -> None:
    router = LinearRouter(0, 4, tap_dim=8, embed_timestep=True)
    torch.nn.init.normal_(router.tap_weight)
    x = torch.randn(2, 5, 6)
    logits = router(x, t)
    assert logits.shape == (2, 1, 4)
    torch.testing.assert_close(logits[:, 0], sinusoidal(t, 8) @ router.tap_weight.T)
    torch.testing.assert_close(router(x, t[0]), logits[0, 0])  # a scalar timestep for the whole batch


def test_parameters_stay_float32_and_logits_are_float32() -> None:
    router = LinearRouter(6, 4, tap_dim=3)
    before = copy.deepcopy(router.state_dict())
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), router).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert all(torch.equal(before[name], value) for name, value in router.state_dict().items())
    x, c = torch.randn(2, 5, 6).bfloat16(), torch.randn(2, 3).bfloat16()
    assert router(x, c).dtype == torch.float32
    torch.testing.assert_close(router(x, c), x.float() @ router.weight.T)
    assert router.double().weight.dtype == torch.float64
    assert router.float().to("meta").weight.is_meta
    assert router.to_empty(device="cpu").weight.dtype == torch.float32


def test_parameters_follow_the_model_if_asked_and_logits_are_still_float32() -> None:
    router = LinearRouter(6, 4, keep_in_fp32=False).to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    x = torch.randn(2, 6).bfloat16()
    torch.testing.assert_close(router(x), x.float() @ router.weight.float().T)


def test_autocast_does_not_reach_the_logits() -> None:
    router = LinearRouter(64, 8)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x)
    assert torch.equal(inside, router(x))


def test_meta() -> None:
    router = LinearRouter(6, 4, tap_dim=8, embed_timestep=True, device="meta")
    assert router(torch.empty(2, 5, 6, device="meta"), torch.empty(2, device="meta")).shape == (2, 5, 4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError):
        LinearRouter(0, 4)
    with pytest.raises(OptionError, match="even"):
        LinearRouter(4, 4, tap_dim=7, embed_timestep=True)
    router = LinearRouter(6, 4, tap_dim=3)
    with pytest.raises(InputError, match="timestep"):
        router(torch.zeros(2, 5, 6))
    with pytest.raises(InputError, match="last axis 5"):
        router(torch.zeros(2, 5, 6), torch.zeros(2, 5))

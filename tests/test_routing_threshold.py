"""Threshold gates and channel groups against their equations."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError, OptionError
from moefx.routing import DenseFFN, Gated, LinearRouter, random_weights, sinusoidal
from moefx.routing.channels import ChannelGroups
from moefx.routing.heads import QueryGate
from moefx.routing.threshold import ThresholdGate, budget_loss
from moefx.training import aux_loss, step_schedules

D, F_, G, W = 6, 24, 4, 8


def gate_with(bias: float, *, weight: float = 0.0, **options: object) -> ThresholdGate:
    router = LinearRouter(0, G - 1, tap_dim=W, embed_timestep=True, bias=True)
    with torch.no_grad():
        router.bias.fill_(bias)
        router.tap_weight.normal_(std=weight) if weight else None
    return ThresholdGate(router, G, **options)


def test_the_published_start_keeps_all_and_its_opposite_keeps_the_first() -> None:
    x, t = torch.randn(3, 5, D), torch.tensor([0.0, 500.0, 999.0])
    for training in (True, False):
        assert torch.equal(gate_with(15.0).train(training)(x, t), torch.ones(3, 1, G))
        assert torch.equal(gate_with(-15.0).train(training)(x, t), torch.tensor([1.0, 0, 0, 0]).expand(3, 1, G))


def test_evaluation_is_the_sign_of_the_logits_with_the_gradient_of_the_soft_gate() -> None:
    gate = gate_with(0.0, weight=3.0, temperature=2.0).double().eval()
    x, t = torch.randn(5, 2, D).double(), torch.arange(5.0).double() * 99
    gates = gate(x, t)
    z = sinusoidal(t, W).double() @ gate.router.tap_weight.T + gate.router.bias
    expected = torch.cat([torch.ones(5, 1), (z > 0).double()], dim=-1).unsqueeze(1)
    assert torch.equal(gates, expected)
    assert 0 < gates[..., 1:].mean() < 1
    weights = torch.randn(5, 1, G).double()
    (gates * weights).sum().backward()
    soft = torch.sigmoid(z / 2.0)
    by_hand = (weights[:, 0, 1:] * soft * (1 - soft) / 2.0).sum(0)
    torch.testing.assert_close(gate.router.bias.grad, by_hand, rtol=1e-10, atol=0)


def test_training_noise_is_the_difference_of_two_gumbels() -> None:
    gate = gate_with(1.0)
    on = gate(torch.randn(20000, 1, D), torch.zeros(20000))[..., 1:].mean()
    gumbel = torch.distributions.Gumbel(0.0, 1.0)
    wanted = (1.0 + gumbel.sample((60000,)) - gumbel.sample((60000,)) > 0).float().mean()
    torch.testing.assert_close(on.detach(), wanted, rtol=0, atol=0.01)


def test_budget_of_a_layer_and_of_the_model() -> None:
    one, two = gate_with(15.0, target=0.5, cost=3.0), gate_with(-15.0, target=0.5, cost=1.0)
    model = torch.nn.ModuleList([one, two]).eval()
    for gate in model:
        gate(torch.randn(2, 3, D), torch.zeros(2))
    torch.testing.assert_close(aux_loss(model).detach(), torch.tensor(2 * (0.25 + 0.0625) / 2))
    torch.testing.assert_close(budget_loss(model, 0.5).detach(), torch.tensor(((3 * 1 + 0.25) / 4 - 0.5) ** 2))
    budget_loss(model, 0.1).backward()
    assert one.router.bias.grad.sum() > 0  # descent lowers the bias
    assert torch.equal(one.record.load, torch.full((3,), 1 / 3))
    assert two.record.load.sum() == 0
    with pytest.raises(InputError, match="no threshold gate"):
        budget_loss(torch.nn.Linear(1, 1), 0.5)


def test_the_target_falls_with_progress() -> None:
    gate = gate_with(15.0, target=0.5, warmup=0.2)
    assert [step_schedules(gate, p) and round(gate.target.item(), 6) for p in (0.0, 0.1, 0.2, 1.0)] == [
        1,
        0.75,
        0.5,
        0.5,
    ]


class Mask(torch.nn.Module):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = torch.nn.Parameter(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mask


@given(st.sampled_from([1, 2, 3, 6]), st.booleans(), st.integers(0, 3), st.sampled_from(["gelu", "sigmoid"]))
@settings(deadline=None, max_examples=25)
def test_channel_groups_follow_the_equation(groups: int, gated: bool, batch: int, act: str) -> None:
    plain = {"gelu": F.gelu, "sigmoid": F.sigmoid}[act]
    weights = random_weights(D, F_, gated=gated, dtype=torch.float64)
    mask = (torch.rand(batch, 1, groups) < 0.5).double()
    layer = ChannelGroups(weights, Gated(plain) if gated else plain, Mask(mask), groups)
    x = torch.randn(batch, 5, D, dtype=torch.float64, requires_grad=True)
    m = torch.stack([mask[..., i // (F_ // groups)] for i in range(F_)], dim=-1)
    up = (x @ weights.w_in.T + weights.b_in) * m
    hidden = plain((x @ weights.w_gate.T + weights.b_gate) * m) * up if gated else plain(up)
    expected = hidden @ weights.w_out.T + weights.b_out
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    gradient = torch.randn_like(y)
    a, b = torch.autograd.grad(y, x, gradient), torch.autograd.grad(expected, x, gradient)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("act", [F.gelu, F.sigmoid])
def test_cutting_groups_out_is_masking_them(act: object) -> None:
    weights = random_weights(D, F_, dtype=torch.float64)
    layer = ChannelGroups(weights, act, Mask(torch.tensor([1.0, 0, 0, 1]).double()), 4)
    cut = layer.kept([0, 3])
    assert isinstance(cut, DenseFFN)
    assert cut.w_in.shape == (F_ // 2, D)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.testing.assert_close(cut(x), layer(x), rtol=1e-10, atol=1e-12)


def test_gates_of_channels_are_batch_invariant_and_compile_once() -> None:
    layer = ChannelGroups(random_weights(D, F_), F.gelu, gate_with(0.0, weight=3.0), G).eval()
    x, t = torch.randn(6, 5, D), torch.rand(6) * 999
    whole = layer(x, t)
    torch.testing.assert_close(layer(x[:2], t[:2]), whole[:2])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 6):
            torch.testing.assert_close(compiled(x[:batch], t[:batch]), whole[:batch])


def test_longest_queries_are_on() -> None:
    gate = QueryGate(6, shared=2, top_k=2, shared_heads=[1, 4]).double()
    q = torch.randn(2, 5, 6, 3, dtype=torch.float64, requires_grad=True)
    gates = gate(q)
    for b in range(2):
        for t in range(5):
            length = {h: q[b, t, h].square().sum().sqrt().item() for h in (0, 2, 3, 5)}
            best = sorted(length, key=lambda h: -length[h])[:2]
            assert gates[b, t].tolist() == [float(h in (1, 4) or h in best) for h in range(6)]
    weights = torch.randn_like(gates)
    (gates * weights).sum().backward()
    other = q.detach().clone().requires_grad_()
    norms = other.square().sum(-1).sqrt()[..., [0, 2, 3, 5]]
    p = (norms / norms.std(-1, keepdim=True)).softmax(-1)
    chosen = gates[..., [0, 2, 3, 5]].detach()
    (p * chosen * weights[..., [0, 2, 3, 5]]).sum().backward()
    torch.testing.assert_close(q.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_all_heads_are_the_identity_and_the_balance_is_the_papers() -> None:
    q = torch.randn(2, 5, 6, 3)
    assert torch.equal(QueryGate(6, shared=2)(q), torch.ones(2, 5, 6))
    assert torch.equal(QueryGate(6, shared=5)(q), torch.ones(2, 5, 6))
    gate = QueryGate(6, shared=2, top_k=2)
    gates = gate(q)[..., 2:]
    z = q.norm(dim=-1)[..., 2:]
    p = (z / z.std(-1, keepdim=True)).softmax(-1).mean((0, 1))
    torch.testing.assert_close(aux_loss(gate), 0.01 * (p * gates.mean((0, 1))).mean() * 16)


def test_impossible_groups_are_refused() -> None:
    with pytest.raises(OptionError, match="no group to switch"):
        ThresholdGate(LinearRouter(0, 1, tap_dim=2, bias=True), 1)
    with pytest.raises(OptionError, match="remainder"):
        ChannelGroups(random_weights(D, F_), F.gelu, Mask(torch.ones(5)), 5)

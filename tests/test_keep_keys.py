"""Skipped tokens that stay keys and values: the equation on a block, what models it can be realised in, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.errors import NothingMatched
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3, WAN
from tests.trace_support import call, error, tensors

pytestmark = support.MARKS


def attended(block: nn.Module, normed: Tensor, chosen: Tensor) -> Tensor:
    """Return the attention's output for the chosen tokens, keys and values of all, head by head."""
    attention = block.attn
    heads = attention.heads
    qkv = normed @ attention.qkv.weight.T + attention.qkv.bias
    q, k, v = (part.view(len(normed), heads, -1) for part in qkv.chunk(3, -1))
    rows = []
    for i in chosen.tolist():
        parts = [(q[i, h] @ k[:, h].T / q.shape[-1] ** 0.5).softmax(-1) @ v[:, h] for h in range(heads)]
        rows.append(torch.cat(parts))
    return torch.stack(rows) @ attention.proj.weight.T + attention.proj.bias


def written_out(block: nn.Module, router: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    samples = []
    for s in range(x.shape[0]):
        r = x[s] @ router.weight[0] + router.bias[0]
        chosen = r.argsort(descending=True)[: x.shape[1] // 2].sort().values
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c[s]).chunk(6, -1)

        def norm(h: Tensor) -> Tensor:
            return F.layer_norm(h, h.shape[-1:], eps=1e-6)

        h = x[s, chosen] + gate1 * attended(block, norm(x[s]) * (1 + scale1) + shift1, chosen)
        h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
        updated = x[s, chosen] + r[chosen].unsqueeze(1) * (h - x[s, chosen])
        samples.append(x[s].index_copy(0, chosen, updated))
    return torch.stack(samples)


def test_the_equation_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    inputs = (torch.randn(2, 1, 8, 8).double(), torch.tensor([20.0, 600]).double(), torch.tensor([3, 7]))
    dense = model.blocks[0]
    moefx.transform(
        model, inputs, recipe="mixture-of-depths", capacity=0.5, router_std=0.3, keep_keys=True, every=2, max_error=9.0
    )
    block = model.double().blocks[0]
    assert type(block) is not type(model.blocks[1])
    x = torch.randn(2, 16, block.token_router.weight.shape[1], dtype=torch.float64)
    c = torch.randn(2, model.blocks[0].token_router.weight.shape[1], dtype=torch.float64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    learnt = list(block.parameters())
    found, wanted = block(one, c), written_out(block, block.token_router, two, c)
    assert dense is block
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 1e-10
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found).cos()
    mine = torch.autograd.grad((found * weight).sum(), [one, *learnt])
    theirs = torch.autograd.grad((wanted * weight).sum(), [two, *learnt])
    for a, b in zip(mine, theirs, strict=True):
        assert float((a - b).norm()) <= 1e-10 * max(1.0, float(b.norm()))


@pytest.mark.parametrize("name", [DIT, SD3, FLUX, WAN])
def test_models(name: str, tmp_path: Path) -> None:
    options = {"keep_keys": True, "every": 1}
    exact = support.realised("mixture-of-depths", name, **options)
    support.check_equal(exact, name)
    kept, dropped = (
        support.realised(
            "mixture-of-depths", name, capacity=0.5, router_std=0.5, every=1, max_error=9.0, keep_keys=keep
        )
        for keep in (True, False)
    )
    assert len(kept.moefx.report.plan.sites) == len(exact.moefx.report.plan.sites)
    assert kept.moefx.report.plan.cost.flops_after > dropped.moefx.report.plan.cost.flops_after
    for batch in (2, 3):
        one, two = (call(m, support.inputs(name, batch)) for m in (kept, dropped))
        assert all(bool(t.isfinite().all()) for t in tensors(one))
        assert error(one, two) > 1e-5
    if name == DIT:
        support.check_saves(kept, name, tmp_path, 1e-6)
        support.check_batch_invariant(kept, name)


def test_refused_where_the_attention_is_not_one_call() -> None:
    class Own(nn.Module):
        """A block whose attention is spelt out."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.o((self.q(x) @ self.k(x).mT / 8**0.5).softmax(-1) @ self.v(x))
            return x + self.down(F.gelu(self.up(x)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Own(), Own()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(NothingMatched, match="not one fused call"):
        moefx.transform(Model(), (torch.randn(2, 6, 8),), recipe="mixture-of-depths", keep_keys=True)

"""Every recipe that splits a dense network, against its equations written out token by token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import moefx
from moefx.routing import RoutedFFN
from moefx.routing.slices import merge
from tests.split_support import F64, Plain, all_tokens, batch, calibrated, convert, gelu, loss, relative

NAME = "blocks.1.mlp"


def compare(
    routed: RoutedFFN,
    plain: Plain,
    reference: Callable[[Tensor], Tensor],
    *,
    routers: Iterable[Tensor] = (),
    tokens: int = 20,
) -> None:
    """Forward and gradients to 1e-10; weight gradients are those of the same neurons. Both sides read ``routers``."""
    x = torch.randn(2, tokens // 2, 16, generator=torch.Generator().manual_seed(5), dtype=F64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = routed(one)
    wanted = torch.stack([reference(t) for t in two.reshape(-1, 16)]).view(x.shape)
    assert relative(found, wanted) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=F64)
    leaves = list(routers)
    ours = torch.autograd.grad((found * weight).sum(), leaves, retain_graph=True) if leaves else ()
    theirs = torch.autograd.grad((wanted * weight).sum(), leaves, retain_graph=True) if leaves else ()
    assert all(bool(b.any()) and relative(a, b) < 1e-10 for a, b in zip(ours, theirs, strict=True))
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert relative(one.grad, two.grad) < 1e-10
    order, experts = routed.neurons, getattr(routed.experts, "experts", routed.experts)
    parts = [routed.shared] if routed.shared is not None else []
    mine = torch.cat([*(p.w_in.grad for p in parts), experts.w_in.grad.flatten(0, 1)])
    assert relative(mine, plain.w1.grad[order]) < 1e-10
    mine = torch.cat([*(p.w_out.grad for p in parts), *experts.w_out.grad.unbind(0)], 1)
    assert relative(mine, plain.w2.grad[:, order]) < 1e-10


def slices(routed: RoutedFFN, shared: int, experts: int) -> tuple[Tensor, list[Tensor]]:
    """Neurons of the shared network and of every slice, checked to be all of them, once."""
    order = routed.neurons
    assert sorted(order.tolist()) == list(range(64))
    width = 64 // (shared + experts)
    return order[: shared * width], list(order[shared * width :].view(experts, width))


def taylor(model: Any) -> Tensor:
    """Sum of |dL/dh h| by a forward whose hidden layer keeps its gradient."""
    total = torch.zeros(64, dtype=F64)
    for i in range(4):
        kept: list[Tensor] = []

        def keep(_: Any, args: tuple[Tensor, ...], kept: list[Tensor] = kept) -> None:
            args[0].retain_grad()
            kept.append(args[0])

        handle = model.get_submodule(NAME).fc2.register_forward_pre_hook(keep)
        loss(model(*batch(i)), batch(i)).backward()
        handle.remove()
        total += (kept[0] * kept[0].grad).abs().sum((0, 1)).detach()
    return total


def test_dense2moe() -> None:
    dense, model = convert("dense2moe")
    routed, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    shared, parts = slices(routed, 4, 12)
    ranks = taylor(dense).argsort(descending=True)
    assert set(shared.tolist()) == set(ranks[:16].tolist())
    for e, part in enumerate(parts):
        assert set(part.tolist()) == set(ranks[16 + e :: 12].tolist())
    W = routed.router.double().weight
    assert 0.01 < float(W.detach().std()) < 0.03

    def reference(x: Tensor) -> Tensor:
        p = (W @ x).softmax(0)
        best = sorted(range(12), key=lambda e: (-float(p[e].detach()), e))[:2]
        return plain.part(x, shared) + sum(12 * p[e] * plain.part(x, parts[e]) for e in best) + plain.b2

    compare(routed, plain, reference, routers=[W])
    # The router learns in training and in evaluation mode.
    for mode in (True, False):
        model.zero_grad()
        model.train(mode)(*batch(1)).square().sum().backward()
        assert routed.router.weight.grad.norm() > 0
    # With equal gates the active slices have their dense weight: all of them are the dense network.
    with torch.no_grad():
        routed.router.weight.zero_()
    routed.selector.k = 12
    x = torch.randn(1, 9, 16, dtype=F64)
    assert relative(routed(x), dense.get_submodule(NAME)(x)) < 1e-12


def test_moefication() -> None:
    dense, model = convert("moefication", experts=8, top_k=2, router_steps=150)
    routed, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    _, parts = slices(routed, 0, 8)
    rows = torch.nn.functional.normalize(plain.w1.detach(), dim=1)
    spent = sum(float((rows[p] - rows[p].mean(0)).square().sum()) for p in parts)
    random = sum(float((rows[p] - rows[p].mean(0)).square().sum()) for p in torch.randperm(64).view(8, 8))
    assert spent < random
    scorer = routed.router.scorer
    Wa, Wb = scorer.w_in.detach().double(), scorer.w_out.detach().double()

    def reference(x: Tensor) -> Tensor:
        s = Wb @ torch.tanh(Wa @ (x / x.norm()))
        best = sorted(range(8), key=lambda e: (-float(s[e].detach()), e))[:2]
        return sum(plain.part(x, parts[e]) for e in best) + plain.b2

    compare(routed, plain, reference)
    # It was trained: the foreseen slices hold more positive activation than slices chosen at random.
    x = all_tokens(dense)
    mass = torch.stack([plain.hidden(x)[:, p].clamp(min=0).sum(1) for p in parts], 1).detach()
    s = torch.tanh(torch.nn.functional.normalize(x, dim=1) @ Wa.T) @ Wb.T
    caught = mass.gather(1, s.topk(2, 1).indices).sum() / mass.sum()
    assert caught > 1.3 * 2 / 8


def test_d2dmoe() -> None:
    dense, model = convert("d2dmoe", experts=16, top_k=4, router_hidden=24, router_steps=200)
    routed, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    _, parts = slices(routed, 0, 16)
    scorer, tau = routed.router.scorer, float(routed.selector.tau)
    w = [p.detach().double() for p in (scorer.w_in, scorer.b_in, scorer.w_out, scorer.b_out)]

    def chosen(x: Tensor) -> list[int]:
        s = (w[2] @ torch.relu(w[0] @ x + w[1]) + w[3]).abs()
        return [e for e in range(16) if s[e] >= (1 - tau) * s.max()]

    compare(routed, plain, lambda x: sum(plain.part(x, parts[e]) for e in chosen(x)) + plain.b2)
    x = all_tokens(dense)
    assert sum(len(chosen(t)) for t in x) / len(x) == pytest.approx(4, abs=0.15)
    norms = torch.stack([plain.part(x, p).norm(dim=1) for p in parts], 1).detach()
    s = (torch.relu(x @ w[0].T + w[1]) @ w[2].T + w[3]).abs()
    assert torch.corrcoef(torch.stack([s.flatten(), norms.flatten()]))[0, 1] > 0.5
    # tau = 1 is the dense network.
    routed.selector.tau.fill_(1.0)
    x = torch.randn(2, 5, 16, dtype=F64)
    assert relative(routed(x), dense.get_submodule(NAME)(x)) < 1e-12


def test_cmoe() -> None:
    dense, model = convert("cmoe", experts=6, shared=2, top_k=2)
    routed, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    shared, parts = slices(routed, 2, 6)
    h = plain.hidden(all_tokens(dense)).detach()
    marks = torch.zeros_like(h).scatter(1, h.abs().topk(10, 1).indices, 1.0)
    rate = marks.mean(0)
    ranks = sorted(range(64), key=lambda i: (-float(rate[i]), i))
    assert set(shared.tolist()) == set(ranks[:16])
    rest = sorted(ranks[16:])
    cost = torch.cdist(marks.T[rest], marks.T[ranks[16:22]], p=1)
    found = {int(n): e for e, part in enumerate(parts) for n in part}
    spent = sum(float(cost[i, found[n]]) for i, n in enumerate(rest))
    columns = cost.repeat_interleave(8, 1).numpy()
    assert spent == pytest.approx(columns[linear_sum_assignment(columns)].sum(), abs=1e-9)
    typical = [min(p.tolist(), key=lambda n, p=p: float((marks.T[n] - marks.T[p].mean(0)).abs().sum())) for p in parts]
    length = plain.w1[typical].norm(dim=1).detach()
    row, bias = plain.w1[typical].detach() / length[:, None], plain.b1[typical].detach() / length
    u = torch.tensor([-1.0, -0.5, 0.25, 0.5, 0.75, 1.0], dtype=F64)
    with torch.no_grad():
        routed.double().gate_scale.copy_(u)
        routed.router.scorer.w_up.copy_(row)
        routed.router.scorer.b_up.copy_(bias)
    learnt = [routed.router.scorer.w_up, routed.router.scorer.b_up, routed.gate_scale]

    def reference(x: Tensor) -> Tensor:
        s = gelu(learnt[0] @ x + learnt[1]).abs()
        p = s.softmax(0)
        best = sorted(range(6), key=lambda e: (-float(s[e].detach()), e))[:2]
        return plain.part(x, shared) + sum((1 + learnt[2][e] * p[e]) * plain.part(x, parts[e]) for e in best) + plain.b2

    compare(routed, plain, reference, routers=learnt)
    assert routed.selection_bias is not None


def test_cmoe_starts_from_its_typical_neurons() -> None:
    dense, model = convert("cmoe", experts=6, shared=2, top_k=2)
    routed = model.get_submodule(NAME)
    rows = routed.router.scorer.w_up.detach()
    assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-6)
    weights = torch.nn.functional.normalize(dense.get_submodule(NAME).fc1.weight.detach().float(), dim=1)
    for e, part in enumerate(slices(routed, 2, 6)[1]):
        assert any(torch.allclose(rows[e], weights[n], atol=1e-6) for n in part.tolist())


def test_read_me() -> None:
    dense, model = convert("read-me", experts=3)
    layer, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    x = all_tokens(dense)
    h = plain.hidden(x).detach().abs().view(4, 6, -1, 64)  # batches, samples at rising times, tokens
    for e in range(3):
        mean = h[:, 2 * e : 2 * e + 2].mean((0, 1, 2))
        assert set(layer.subsets[e].tolist()) == set(mean.topk(32).indices.tolist())
    W, b = layer.router.double().weight, layer.router.bias

    def reference(sample: Tensor) -> Tensor:
        logits = W @ sample.mean(0) + b
        p = logits.softmax(0)
        e = int(logits.argmax())
        gate = 1 + (p[e] - p[e].detach())
        return gate * plain.part(sample, layer.subsets[e]) + plain.b2

    samples = x.view(24, 16, 16)[:6]
    one, two = samples.clone().requires_grad_(), samples.clone().requires_grad_()
    found, wanted = layer(one), torch.stack([reference(s) for s in two])
    assert relative(found, wanted) < 1e-10
    ours, theirs = (torch.autograd.grad(y.square().sum(), [W, b], retain_graph=True) for y in (found, wanted))
    assert all(bool(g.any()) and relative(f, g) < 1e-10 for f, g in zip(ours, theirs, strict=True))
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert relative(one.grad, two.grad) < 1e-10
    assert relative(layer.ffn.w_in.grad, plain.w1.grad) < 1e-10
    # The router tells the noise level of samples it saw: better than a guess.
    level = torch.arange(24) % 6 // 2
    told = (x.view(24, 16, 16).mean(1) @ W.T + b).argmax(1)
    assert (told == level).double().mean() > 0.6


def test_lazy_neuron() -> None:
    dense, model = convert("lazy-neuron", keep=0.25)
    layer, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))

    def reference(x: Tensor) -> Tensor:
        h = plain.hidden(x)
        best = sorted(range(64), key=lambda i: (-abs(float(h[i].detach())), i))[:16]
        return plain.part(x, torch.tensor(best)) + plain.b2

    x = torch.randn(12, 16, dtype=F64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = layer(one), torch.stack([reference(t) for t in two])
    assert relative(found, wanted) < 1e-10
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert relative(one.grad, two.grad) < 1e-10
    assert relative(layer.w_out.grad, plain.w2.grad) < 1e-10


@pytest.mark.parametrize("rows", [1, 3])
def test_chess(rows: int) -> None:
    """Without a gate the threshold is one number per layer; per interval of timesteps where there are several."""
    model, calibration = calibrated()
    from moefx.passes.analysis import analyse
    from moefx.passes.rewrite.base import Context
    from moefx.passes.rewrite.sparse_neurons import SparseNeurons

    mlp = copy.deepcopy(model.get_submodule(NAME))
    graph = moefx.trace(mlp, (torch.randn(6, 16, 16, dtype=F64),))
    from moefx.passes.analysis.local import local_sites

    assert analyse(graph) is not None
    (site,) = local_sites(graph)
    rule = SparseNeurons(rule="threshold", keep=0.5, timestep_thresholds=rows)
    rule.calibration = calibration
    layer = rule.build(Context(graph=graph, site=site, name=NAME, taps={}, seed=0, whole=True))
    plain = Plain(mlp)
    h = plain.hidden(all_tokens(model)).detach().abs().view(4, 6, -1, 64)
    for n in range(rows):
        mine = h[:, n * 6 // rows : (n + 1) * 6 // rows]
        assert float((mine > layer.threshold[n].double()).double().mean()) == pytest.approx(0.5, abs=0.01)
        assert layer.threshold[n].std() < 1e-6
    x = torch.randn(6, 5, 16, dtype=F64)
    t = torch.tensor([0.0, 332.0, 334.0, 600.0, 700.0, 1000.0])
    row = torch.tensor([0, 0, 1, 1, 2, 2]) if rows == 3 else torch.zeros(6, dtype=torch.long)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    on = (plain.hidden(x).abs() > layer.threshold[row].double()[:, None]).double().detach()
    found = layer(one, *([t] if rows > 1 else []))
    wanted = (plain.hidden(two) * on) @ plain.w2.T + plain.b2
    assert relative(found, wanted) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=F64)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert 0 < float(on.mean()) < 1
    mine, theirs = (layer.w_in, layer.b_in, layer.w_out, layer.b_out), (plain.w1, plain.b1, plain.w2, plain.b2)
    for a, b in zip((one, *mine), (two, *theirs), strict=True):
        assert relative(a.grad, b.grad) < 1e-10


def test_moefx_split() -> None:
    options = {"experts": 12, "shared": 4, "top_k": 4}
    dense, model = convert("moefx-split", **options)
    routed, plain = model.get_submodule(NAME), Plain(dense.get_submodule(NAME))
    shared, parts = slices(routed, 4, 12)
    x = all_tokens(dense)
    h = plain.hidden(x).detach()
    # The groups' variances are averaged: what varies within a noise level counts.
    within = h.view(4, 6, -1, 64).transpose(0, 1).flatten(1, 2).var(1, unbiased=False).mean(0)
    value = within * plain.w2.detach().square().sum(0)
    assert set(shared.tolist()) == set(value.topk(16).indices.tolist())
    W, bias = routed.router.weight.detach().double(), routed.router.bias.detach().double()
    cut = routed.selector.cut.flatten().double()

    def scores(x: Tensor) -> Tensor:
        return x @ W.T + bias

    taken = scores(x) > cut
    assert float(taken.double().sum(1).mean()) == pytest.approx(4, abs=0.1)
    outputs = torch.stack([plain.part(x, p) for p in parts], 1).detach()
    # Ridge regression of the centred slices' norms.
    z = (outputs - outputs.mean(0)).norm(dim=2)
    centred = x - x.mean(0)
    weight = 1e-3 * centred.square().sum(0).mean() * torch.eye(16, dtype=F64)
    assert relative(W, torch.linalg.solve(centred.T @ centred + weight, centred.T @ (z - z.mean(0))).T) < 1e-5
    mu = torch.stack([outputs[~taken[:, e], e].mean(0) for e in range(12)])
    y = plain.part(x, shared).detach() + torch.where(taken[:, :, None], outputs, mu).sum(1)
    full = plain.part(x, shared).detach() + outputs.sum(1)
    centred = y - y.mean(0)
    a = ((centred * (full - full.mean(0))).mean(0) / centred.square().mean(0)).clamp(0.25, 4)
    b = full.mean(0) - a * y.mean(0)

    def reference(x: Tensor) -> Tensor:
        on = scores(x) > cut
        y = plain.part(x, shared) + sum(plain.part(x, parts[e]) if on[e] else mu[e] for e in range(12))
        return a * y + b + plain.b2

    x = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(5), dtype=F64)
    wanted = torch.stack([reference(t) for t in x.reshape(-1, 16)]).view(x.shape)
    # The sample and the constants are kept in float32.
    assert relative(routed(x), wanted) < 1e-6
    # Corrected means: less is lost than without.
    plainly = convert("moefx-split", compensation="none", channels="none", **options)[1].get_submodule(NAME)
    tokens = all_tokens(dense).view(4, -1, 16)
    target = dense.get_submodule(NAME)(tokens)
    assert relative(routed(tokens), target) < relative(plainly(tokens), target)


def test_moefx_split_learns_as_its_equation_says() -> None:
    """y = S(x) + b + sum of E_e(x) + o_e over the slices above the cut, from the layer's parameters."""
    routed = convert("moefx-split", experts=12, shared=4, top_k=4)[1].get_submodule(NAME).double()
    experts, shared = routed.experts.experts, routed.shared
    learnt = [
        experts.w_in,
        experts.b_in,
        experts.w_out,
        experts.b_out,
        routed.experts.offset,
        shared.w_in,
        shared.w_out,
    ]
    x = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(5), dtype=F64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    on = (two @ routed.router.weight.T + routed.router.bias > routed.selector.cut.flatten()).detach()
    wanted = gelu(two @ shared.w_in.T + shared.b_in) @ shared.w_out.T + experts.b_out
    for e in range(12):
        part = gelu(two @ experts.w_in[e].T + experts.b_in[e]) @ experts.w_out[e].T + routed.experts.offset[e]
        wanted = wanted + on[..., e : e + 1] * part
    found = routed(one)
    assert 1 < float(on.double().sum(-1).mean()) < 8
    assert relative(found, wanted) < 1e-10
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=F64)
    mine = torch.autograd.grad((found * weight).sum(), [one, *learnt], allow_unused=True)
    theirs = torch.autograd.grad((wanted * weight).sum(), [two, *learnt], allow_unused=True)
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) is (b is None)
        assert b is None or relative(a, b) < 1e-10


@pytest.mark.parametrize("recipe", ["lazy-neuron", "chess", "read-me"])
def test_with_every_neuron_kept_it_is_the_dense_network(recipe: str) -> None:
    dense, model = convert(recipe, keep=1.0, **({"experts": 3} if recipe == "read-me" else {}))
    x = torch.randn(2, 9, 16, dtype=F64)
    assert relative(model.get_submodule(NAME)(x), dense.get_submodule(NAME)(x)) < 1e-12
    assert {check.contract for check in model.moefx.report.checks} == {"exact"}


def test_a_width_bounds_the_slices_of_a_token() -> None:
    options = {"experts": 12, "shared": 4, "top_k": 4}
    dense, free = convert("moefx-split", **options)
    bound = convert("moefx-split", width=5, **options)[1].get_submodule(NAME)
    x = all_tokens(dense)[:40].unsqueeze(0)
    every, few = (layer.route(x).experts < 12 for layer in (free.get_submodule(NAME), bound))
    assert few.shape == (40, 5)
    assert every.sum(1).clamp(max=5).tolist() == few.sum(1).tolist()


def test_slices_merge_back_to_the_bit() -> None:
    for recipe, options in (
        ("cmoe", {"experts": 6}),
        ("moefx-split", {"experts": 12, "shared": 4, "channels": "none"}),
    ):
        dense, model = convert(recipe, top_k=2, **options)
        mlp, back = dense.get_submodule(NAME), merge(model.get_submodule(NAME))
        assert torch.equal(back.w_in, mlp.fc1.weight)
        assert torch.equal(back.b_in, mlp.fc1.bias)
        assert torch.equal(back.w_out, mlp.fc2.weight)
        assert torch.allclose(back.b_out, mlp.fc2.bias, atol=1e-6)
